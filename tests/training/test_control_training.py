"""ControlNets that are trained: beside a frozen model, from zeros on, on images and on scenes, exactly resumed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.controlnet import find_controlnet
from ldm.checkpoint.describe import describe
from ldm.cli import main
from ldm.control import condition_of
from ldm.data.transforms import pixels
from ldm.diffusion.denoiser import training_loss
from ldm.errors import ConfigError, DataError, Interrupted, LdmError
from ldm.training import train
from ldm.training.command import open_images
from ldm.training.finetuning.command import read_arguments, resolve_settings
from ldm.training.loop import loop, seeded
from ldm.training.settings import read_settings
from ldm.training.stages.control import open_stage
from tests.training.conftest import threads
from tests.training.finetune_cases import SIZE, last_tensors, pictures

QUICK = {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "resolution": SIZE, "held_out": 0.3, "samples": 0}
QUICK |= {"device": "cpu", "precision": "fp32", "warmup": 0, "lr_schedule": "constant", "ema": 0.5, "seed": 3}
QUICK |= {"validate_every": 4, "save_every": 2, "log_every": 1, "control": "edges", "timesteps": "uniform"}
QUICK |= {"timestep_shift": 1.0, "caption_dropout": 0.0, "control_embedding": [4, 4, 8, 8]}
SCENES = ["model=MODEL", "steps=3", "batch_size=4", "precision=fp32", "compile=false", "latent_pool=256", "renew=2"]
SCENES += ["workers=0", "validation=8", "samples=2", "sample_steps=2", "save_every=1", "validate_every=3"]
SCENES += ["log_every=1", f"data.resolution={SIZE}", "control_channels=[32,32]", "control_embedding=[4,4,8,8]"]
SCENES += ["learning_rate=0.001", "warmup=0", "lr_schedule=constant"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "images", 10, ((SIZE, SIZE), (48, SIZE)))


def run(images, out, model, **words):
    with threads(1):
        return ldm.finetune(images, out, model, **{**QUICK, **words})


def stage_of(images, out, model, **words):
    settings, read = resolve_settings(read_arguments(images, out, model, **{**QUICK, **words}))
    return open_stage(settings, out, read)


def scenes(model, out, *overrides, **more):
    words = [word.replace("MODEL", str(model)) for word in SCENES]
    with threads(1):
        return train("emoji/edges", out, [*words, *overrides], **more)


def test_the_first_loss_is_the_models(tiny_folder, images, tmp_path):
    stage = stage_of(images, tmp_path, tiny_folder)
    batch, model = next(stage.batches(0)), load_model(tiny_folder)
    cond = model.text.encode(batch.captions)
    count = len(batch.latents)
    noise = seeded.normal((count, *batch.latents.shape[1:]), 3, "noise", 0, 0)
    u = (torch.arange(count) + seeded.uniform((count,), 3, "timesteps", 0, 0)) / count
    model.unet.train()
    predict = lambda x, t: model.unet(x, t, cond.states, mask=cond.mask, pooled=cond.pooled)  # noqa: E731
    with torch.no_grad():
        more = (batch.latents, noise, (u * 1000).long(), stage.settings.snr_gamma)
        expected = training_loss(predict, model.schedule, *more).mean()
        model.unet.eval()
        assert torch.equal(stage.loss(batch, 0, 0), expected)
        torch.nn.init.normal_(stage.module.controlnet_mid_block.weight)
        assert not torch.equal(stage.loss(batch, 0, 0), expected)


def test_conditions_are_of_what_is_trained_on(tiny_folder, images, tmp_path):
    stage = stage_of(images, tmp_path, tiny_folder, flip=0.5, batch_size=2)
    reader, seen = stage.data._reader, set()
    for number in range(len(stage.data)):
        (_, views), batch = reader._views(number), stage.data.batch(number)
        for (place, view), got in zip(views, batch.control):
            image = pixels(stage.data.images.read(place)[0], view).permute(1, 2, 0).numpy()
            expected = np.asarray(condition_of("edges", Image.fromarray(np.ascontiguousarray(image))))
            assert np.array_equal((got * 255).round().byte().permute(1, 2, 0).numpy(), expected)
            seen |= {(view.flipped, expected.any())}
    assert seen == {(True, True), (False, True)}


def test_conditions_from_a_folder_are_cropped_and_mirrored_with_their_images(tiny_folder, images, tmp_path):
    folder = tmp_path / "conditions"
    folder.mkdir()
    for path in images.glob("*.png"):  # twice as large
        image = Image.open(path)
        image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(folder / path.name)
    stage = stage_of(images, tmp_path / "run", tiny_folder, control=folder, flip=0.5, batch_size=2)
    flipped = set()
    for number in range(len(stage.data)):
        batch, (_, views) = stage.data.batch(number), stage.data._reader._views(number)
        for (place, view), got in zip(views, batch.control):
            image = pixels(stage.data.images.read(place)[0], view) / 255
            assert (image - got).abs().mean() < 0.03 < (image - got.flip(2)).abs().mean()
            flipped.add(view.flipped)
    assert flipped == {True, False}
    before = stage.inputs["data"]
    Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    assert stage_of(images, tmp_path / "again", tiny_folder, control=folder).inputs["data"] != before
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r"no condition of 1 of 10 images \(3.png"):
        stage_of(images, tmp_path / "less", tiny_folder, control=folder)


def test_a_run_that_stops_goes_on_to_the_same_bits(tiny_folder, images, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = {"flip": 0.5, "samples": 2, "sample_steps": 2}
    made = run(images, whole, tiny_folder, **words)
    assert made == whole / "model" / "controlnet"
    after = loop._Run._after_step

    def stopped(run):
        after(run)
        if run.state.step == 2:
            raise Interrupted(2, "stopped", where=parts)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop._Run, "_after_step", stopped)
        run(images, parts, tiny_folder, **words)
    with threads(1):
        ldm.finetune(out=parts, resume=True)
    one, other = last_tensors(whole, ""), last_tensors(parts, "")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["model.controlnet_mid_block.weight"].abs().max() > 0
    assert not [name for name in one if "up_blocks" in name]  # the model is in no checkpoint
    assert Image.open(whole / "samples" / "step-00000004.png").size == (4 * SIZE, SIZE)
    assert "samples/step-00000004.png" in (whole / "index.html").read_text()


def test_it_is_saved_for_diffusers_and_steers_the_model(tiny_folder, images, tmp_path):
    from diffusers import ControlNetModel

    base = load_model(tiny_folder)
    before = {name: t.clone() for name, t in base.unet.state_dict().items()}
    out = tmp_path / "run"
    made = run(images, out, tiny_folder, steps=6, learning_rate=0.03, save_dtype="fp32", ema=0.0)
    theirs = ControlNetModel.from_pretrained(made).state_dict()
    ours = find_controlnet(out, describe(tiny_folder)).load(torch.device("cpu"), torch.float32).state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert all(torch.equal(t, before[name]) for name, t in load_model(tiny_folder).unet.state_dict().items())
    control = Image.open(images / "0.png")
    (plain,) = Pipeline("a red cat", tiny_folder).generate(seed=1, num_inference_steps=3, height=32, width=32)
    pipe = Pipeline("a red cat", tiny_folder, controlnet=out)
    (steered,) = pipe.generate(control_image=control, seed=1, num_inference_steps=3)
    assert np.abs(np.asarray(plain, int) - np.asarray(steered, int)).max() > 5
    assert "edges" in (made / "README.md").read_text()


def test_the_loss_falls(tiny_folder, images, tmp_path):
    stage = stage_of(images, tmp_path, tiny_folder, cache="off")
    batch = next(stage.batches(0))
    optimizer = torch.optim.Adam(stage.module.parameters(), 0.003)
    unet = {name: t.clone() for name, t in stage.model.unet.state_dict().items()}
    losses = []
    for _ in range(25):
        loss = stage.loss(batch, 0, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(t, unet[name]) for name, t in stage.model.unet.state_dict().items())


def test_scenes_are_drawn_with_their_edges_and_resumed(tiny_folder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made = scenes(tiny_folder, whole)
    config = json.loads((made / "config.json").read_text())
    assert config["unet_block_out_channels"] == [32, 64] and config["block_out_channels"] == [32, 32]
    scenes(tiny_folder, parts, "steps=1")
    scenes(tiny_folder, parts, resume="latest")
    one, other = last_tensors(whole, ""), last_tensors(parts, "")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert Image.open(whole / "samples" / "step-00000003.png").size == (4 * SIZE, SIZE)
    settings = read_settings("emoji/edges", [word.replace("MODEL", str(tiny_folder)) for word in SCENES])
    stage = open_stage(settings, tmp_path, open_images(settings, tmp_path))
    batch, samples = stage.data.batch(0), stage.data.images.samples()
    slots = seeded.integers(256, (4,), settings.seed, "rows", 0, 0).tolist()
    for slot, got in zip(slots, batch.control):
        expected = np.asarray(condition_of("edges", Image.fromarray(samples[slot][0])))
        assert np.array_equal((got * 255).byte().permute(1, 2, 0).numpy(), expected) and expected.any()


def test_a_narrow_one_goes_on_and_draws(tiny_folder, images, tmp_path):
    first = run(images, tmp_path / "first", tiny_folder, steps=2, control_channels="32,32")
    again = {"control_init": first, "control_embedding": None, "learning_rate": 1e-9, "ema": 0}
    second = run(images, tmp_path / "second", tiny_folder, steps=1, **again)
    info = describe(tiny_folder)
    nets = [find_controlnet(path, info).load(torch.device("cpu"), torch.float32) for path in (first, second)]
    assert nets[1].control.outputs == (32, 64) and nets[1].control.unet.block_out_channels == (32, 32)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*(net.state_dict().values() for net in nets)))
    pipe = Pipeline("a red cat", tiny_folder, controlnet=first)
    assert pipe.generate(control_image="edges:" + str(images / "0.png"), seed=1, num_inference_steps=1)
    text = (first / "README.md").read_text()
    assert "diffusers' ControlNetModel" in text and "cannot" in text


@pytest.mark.parametrize(
    "words, message",
    [
        ({"control": "edgse"}, "neither a kind of control nor a folder; did you mean 'edges'"),
        ({"control": "edges", "lora_rank": 4}, "lora_rank is for LoRA, and control trains a ControlNet"),
        ({"control": "edges", "train": "lora"}, "trains a ControlNet, and train is lora"),
        ({"control": "edges", "text_encoder": True}, "stays as it is beside a ControlNet"),
        ({"control": "edges", "prior_images": 3, "prior_prompt": "x"}, "stays as it is beside a ControlNet"),
        ({"control": None, "control_embedding": None, "train": "control"}, "is needed for train=control"),
        ({"control": None, "control_channels": [32, 32]}, "needs control=KIND"),
        ({"control": "edges", "control_channels": [32]}, "not one width for each of the U-Net's 2 levels"),
        ({"control": "edges", "control_embedding": [4, 8, 8, 8, 8]}, "has 4 widths"),
        ({"control_init": "nowhere", "control_embedding": None}, "no such ControlNet"),
        ({"control": "edges", "control_chanels": [32]}, "unknown setting"),
    ],
)
def test_mistakes_are_told_before_work(tiny_folder, images, tmp_path, words, message):
    with pytest.raises(LdmError, match=message):
        run(images, tmp_path / "run", tiny_folder, **words)
    assert not (tmp_path / "run" / "cache").exists()


def test_folders_of_conditions_that_cannot_be(tiny_folder, images, tmp_path):
    folder = tmp_path / "conditions"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (SIZE, SIZE)).save(folder / f"{i}.png")
    with pytest.raises(DataError, match="proportions of its image"):
        run(images, tmp_path / "run", tiny_folder, control=folder)
    with pytest.raises(ConfigError, match="trained on as images"):
        run(images, tmp_path / "run", tiny_folder, control=images)
    with pytest.raises(ConfigError, match="drawn scenes have no names"):
        scenes(tiny_folder, tmp_path / "scenes", f"control={folder}")


def test_on_the_command_line(tiny_folder, images, tmp_path, capsys):
    words = ["finetune", str(images), "-o", str(tmp_path / "run"), "--model", str(tiny_folder), "--control", "canny"]
    words += ["--resolution", str(SIZE), "--control-channels", "32,32", "--control-embedding", "4,4,8,8", "--dry-run"]
    assert main([*words, "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert "--control canny --control-channels 32,32" in told and "--train control" in told
    assert "lora" not in told.split("the command with all settings:")[1].splitlines()[1]
