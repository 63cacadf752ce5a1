"""`ldm distill` on a tiny model: what its loss is made of, exact resuming, files that carry how they are drawn."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ldm
from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.describe import describe
from ldm.checkpoint.few_steps import KEY, MODEL_KEY
from ldm.cli import main
from ldm.diffusion.denoiser import denoiser, sample, training_loss
from ldm.diffusion.distillation import Segments, consistency_loss, crossing_loss
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.errors import ConfigError, DataError, Interrupted
from ldm.training.command import open_images
from ldm.training.data import read_images, trajectories
from ldm.training.distilling import read_distill
from ldm.training.finetuning import base_model, prior
from ldm.training.finetuning.base_model import frozen_dtype
from ldm.training.loop import loop, seeded
from ldm.training.settings import DistillSettings, stages
from ldm.training.stages import distill as distilling
from ldm.training.stages.distill import open_stage
from tests.training.conftest import threads
from tests.training.finetune_cases import assert_own_folders, last_tensors, pictures
from tests.waits import META, Waits

QUICK = ["steps=4", "batch_size=4", "learning_rate=0.01", "lora_rank=2", "guidance_scale=3", "device=cpu"]
QUICK += ["precision=fp32", "warmup=0", "ema=0.5", "samples=0", "save_every=2", "validate_every=4", "log_every=1"]
QUICK += ["workers=0", "data.held_out=0.3", "seed=3"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "images")


def distill(model, out, *overrides, **more):
    with threads(1):
        return ldm.distill(model, out, overrides=[*QUICK, *overrides], **more)


def stage_of(model, out, *overrides):
    settings = read_distill(model, out, None, [*QUICK, *overrides], None)
    return open_stage(settings, out, open_images(settings, out))


def scores(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_guidance_asks_for_the_guided_answer_of_the_model(tiny_folder, images, tmp_path):
    stage = stage_of(tiny_folder, tmp_path, "method=guidance", f"data={images}")
    batch = next(stage.batches(0))
    model = load_model(tiny_folder)
    texts = [model.text.encode([caption]) for caption in batch.captions]
    nothing, rows = model.text.encode([None]), range(count := len(texts))

    def guided(x, t):
        def answer(text, i):
            return model.unet(x[i : i + 1], t[i : i + 1], text.states, mask=text.mask)

        both = [(answer(texts[i], i), answer(nothing, i)) for i in rows]
        return torch.cat([u + 3 * (c - u) for c, u in both])

    noise = seeded.normal((count, *batch.latents.shape[1:]), 3, "noise", 0, 0)
    u = (torch.arange(count) + seeded.uniform((count,), 3, "timesteps", 0, 0)) / count
    t = (u * 1000).long()
    with torch.no_grad():
        plain = torch.cat([texts[i].states for i in rows])
        student = lambda x, t: model.unet(x, t, plain)  # noqa: E731  # its updates change nothing yet
        expected = training_loss(student, model.schedule, batch.latents, noise, t, teacher=guided).mean()
        assert torch.allclose(stage.loss(batch, 0, 0), expected, rtol=1e-4)
    assert expected > 1e-4


def test_consistency_asks_the_average_below_and_the_model_above(tiny_folder, images, tmp_path):
    stage = stage_of(tiny_folder, tmp_path, f"data={images}", "intervals=[4,4]")
    batch = next(stage.batches(0))
    model, other = load_model(tiny_folder), load_model(tiny_folder, cache=False)
    torch.nn.init.normal_(other.unet.conv_out.weight, generator=torch.Generator().manual_seed(1))
    stage.follow(other.unet)
    asked = [model.text.encode([caption or None]).states for caption in batch.captions]
    count = len(asked)
    cond, nothing = torch.cat(asked), model.text.encode([None] * count).states

    def teacher(x, t):
        u = model.unet(x, t, nothing)
        return u + 3 * (model.unet(x, t, cond) - u)

    noise = seeded.normal((count, *batch.latents.shape[1:]), 3, "noise", 0, 0)
    u = (torch.arange(count) + seeded.uniform((count,), 3, "timesteps", 0, 0)) / count
    sigmas = Segments(model.schedule, model.schedule.sigmas(4, "ddim", "trailing")).at(u, 4)
    predicts = (lambda x, t: model.unet(x, t, cond), teacher, lambda x, t: other.unet(x, t, cond))
    with torch.no_grad():
        expected = consistency_loss(
            *(denoiser(one, model.schedule) for one in predicts), batch.latents, noise, sigmas
        ).mean()
        assert torch.allclose(stage.loss(batch, 0, 0), expected, rtol=1e-4)


@pytest.fixture
def small_pieces(monkeypatch):
    """The teacher's trajectories are replaced eight at a time."""
    for module in (trajectories, stages):
        monkeypatch.setattr(module, "PIECE", 8)


WAYS = ("method=trajectory", "latent_pool=16", "renew=2", "teacher_steps=4", "segments=2")


def test_a_trajectory_is_the_teachers_own_and_its_segments_are_what_is_learned(
    tiny_folder, images, tmp_path, small_pieces
):
    stage = stage_of(tiny_folder, tmp_path, *WAYS, f"data={images}")
    batches, model = list(stage.batches(0)), load_model(tiny_folder)
    sigmas, nothing = model.schedule.sigmas(4, "dpmpp_2m", "trailing"), model.text.encode([None])
    for step, oldest in ((0, 0), (3, 1)):  # after two steps the first piece is replaced
        batch, losses = batches[step], []
        slots = seeded.integers(16, (4,), 3, "rows", step, 0).tolist()
        for row, slot in enumerate(slots):
            noise = seeded.normal((8, *batch.latents.shape[1:]), 3, "trajectories", oldest + slot // 8)[slot % 8][None]
            cond, seen = model.text.encode([batch.captions[row]]), []
            guided = guided_denoiser(model.unet, cond, nothing, Guidance(scale=3.0), model.schedule, sigmas)
            with torch.no_grad():
                how = {"spacing": "trailing", "callback": lambda i, x, x0, seen=seen: seen.append(x)}
                last = sample(guided, model.schedule, sigmas, noise, "dpmpp_2m", **how)
            start = model.schedule.initial(noise, sigmas, "dpmpp_2m", "trailing")
            ways = [start, seen[1], last]  # of four steps those where the two segments end
            x, end = ways[row % 2], ways[row % 2 + 1]
            assert torch.allclose(batch.latents[row], x[0], rtol=1e-4, atol=1e-4)
            assert torch.allclose(batch.ends[row], end[0], rtol=1e-4, atol=1e-4)
            student = denoiser(lambda x, t, cond=cond: model.unet(x, t, cond.states), model.schedule)
            t, s = (sigmas[2 * (row % 2) + 2 * low][None] for low in (0, 1))
            losses.append(crossing_loss(student, x, end, t, s))
        with torch.no_grad():
            assert torch.allclose(stage.loss(batch, step, 0), torch.cat(losses).mean(), rtol=1e-3)
    known = {item.captions[0] for item in read_images(stage.settings.data).items if item.captions}
    kept = sorted(path.stem for path in (tmp_path / "trajectories").iterdir())
    assert set(batches[0].captions) <= known and kept == ["000001", "000002"]


@pytest.mark.parametrize(("rows", "accumulation", "steps"), [(1, 1, 4), (3, 2, 2)])
def test_each_segment_is_learned_as_often(rows, accumulation, steps, tiny_folder, tmp_path, small_pieces):
    """Also where a batch has fewer rows than there are segments, and of the held-out trajectories."""
    (tmp_path / "captions.txt").write_text("a red cat\na blue dog\na cat\na dog\n")
    words = (*WAYS, "segments=4", "latent_pool=8", "renew=0", f"prompts={tmp_path / 'captions.txt'}", "validation=4")
    words += (f"batch_size={rows}", f"accumulation={accumulation}", f"steps={steps}", "data.resolution=16")
    stage = stage_of(tiny_folder, tmp_path, *words)
    which = [batch.which.tolist() for batch in stage.batches(0)]
    counts = torch.tensor([number for batch in which for number in batch]).bincount(minlength=4)
    assert counts.tolist() == [rows * accumulation * steps // 4] * 4
    assert [batch.which.tolist() for batch in stage.batches(1)] == which[accumulation:]
    assert torch.cat([batch.which for batch in stage.held_out]).tolist() == [0, 1, 2, 3]


def test_what_was_drawn_is_not_drawn_again(tiny_folder, images, tmp_path, small_pieces, monkeypatch):
    words = (*WAYS, f"data={images}", "validation=1")
    first = next(stage_of(tiny_folder, tmp_path, *words).batches(0))
    (tmp_path / "settings.json").touch()  # as a run has it
    again, more = stage_of(tiny_folder, tmp_path, *words), stage_of(tiny_folder, tmp_path, *words, "teacher_steps=2")
    seed, side = (stage_of(tiny_folder, tmp_path, *words, word) for word in ("seed=4", "data.resolution=16"))
    monkeypatch.setattr(trajectories.Trajectories, "_drawn", lambda *_: pytest.fail("the teacher is asked"))
    assert torch.equal(next(again.batches(0)).latents, first.latents)
    for other in (more, seed, side):
        with pytest.raises(pytest.fail.Exception):  # another way is wanted
            next(other.batches(0))


@pytest.mark.parametrize("method", [pytest.param("guidance", marks=pytest.mark.slow), "consistency", "trajectory"])
def test_a_run_that_stops_goes_on_to_the_same_bits(tiny_folder, images, tmp_path, method, monkeypatch, small_pieces):
    words = (*WAYS, f"method={method}", f"data={images}", "intervals=[1,4]", "samples=1", "data.held_out=0")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert distill(tiny_folder, whole, *words) == whole

    whole_step = loop._Run._after_step

    def stopped(run):
        whole_step(run)
        if run.state.step == 2:  # whose checkpoint is saved
            raise Interrupted(2, "stopped", where=parts)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop._Run, "_after_step", stopped)
        distill(tiny_folder, parts, *words)
    with threads(1):
        ldm.distill(out=parts, resume="latest")  # the model and all settings are those of the run
    one, other = last_tensors(whole, ""), last_tensors(parts, "")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["model.mid_block.attentions.0.proj_in.up"], torch.zeros(64, 2, 1, 1))
    assert all(row["teacher_distance"] > 0 for row in scores(whole)) and (whole / "index.html").is_file()


def test_the_file_carries_how_it_is_drawn(tiny_folder, images, tmp_path, capsys):
    out = distill(tiny_folder, tmp_path / "four", f"data={images}", "segments=3")
    found = header(out / "pytorch_lora_weights.safetensors")
    assert (
        json.loads(found[KEY])["num_inference_steps"] == 3
        and found[MODEL_KEY] == describe(tiny_folder, hashed=True).hash
    )
    assert header(out / "four.safetensors")[KEY] == found[KEY]
    (record,) = Pipeline("a cat", tiny_folder, lora=out).generate(seed=1).metadata
    taken = {name: record[name] for name in ("sampler", "spacing", "num_inference_steps", "guidance_scale")}
    assert taken == {"sampler": "ddim", "spacing": "trailing", "num_inference_steps": 3, "guidance_scale": 1.0}
    assert record["few_steps"] == "few-step" and "no guidance" in (out / "README.md").read_text()
    # a second run begins with it, and asks it without guidance
    settings = ["init=" + str(out), "guidance_scale=null", f"data={images}"]
    stage = stage_of(tiny_folder, tmp_path / "more", *settings)
    assert stage.scale == 1.0 and (stage.teacher.conv_in.weight != load_model(tiny_folder).unet.conv_in.weight).any()


def test_each_average_is_a_lora_of_its_own(tiny_folder, images, tmp_path):
    out = distill(tiny_folder, tmp_path / "run", f"data={images}", "steps=2", "ema=0", "ema_lengths=[0.9]")
    assert_own_folders(out)
    assert header(out / "model-ema-0.9" / "run.safetensors")[KEY] == header(out / "run.safetensors")[KEY]


def test_a_whole_model_is_told_any_scale(tiny_folder, images, tmp_path):
    words = ("train=full", "method=guidance", "guidance_range=[1,5]", "guidance_scale=null", f"data={images}")
    out = distill(tiny_folder, tmp_path / "told", *words, "save_dtype=fp32", "steps=2")
    assert scores(tmp_path / "told")[-1]["validation_loss"] > 0
    info = describe(out)
    assert info.unet.time_cond_proj_dim == 256 and info.card["guidance_scale"] == 3.0
    pipe = Pipeline("a cat", out)
    low, high = pipe.generate(seed=[1, 1], guidance_scale=[1.0, 5.0], steps=2)
    assert low.tobytes() != high.tobytes()


def test_captions_alone_are_enough(tiny_folder, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a red cat\n\n# not this\na blue dog\n")
    words = (f"prompts={tmp_path / 'captions.txt'}", "drawn=6", "steps=1", "samples=0", "save_every=9")
    out = distill(tiny_folder, tmp_path / "run", *words)
    assert len(list((out / "drawn").glob("*.png"))) == 6
    assert "6 images are drawn by the model, of 2 captions in captions.txt" in distilled_dry(
        tiny_folder, tmp_path, words, capsys
    )
    (tmp_path / "captions.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"captions\.txt: holds no caption"):
        distill(tiny_folder, tmp_path / "other", *words)


@pytest.fixture(scope="module")
def guided(tiny_folder, images, tmp_path_factory):
    """A LoRA that does without guidance."""
    out = tmp_path_factory.mktemp("runs") / "guided"
    return distill(tiny_folder, out, "method=guidance", f"data={images}", "learning_rate=0.05", "data.held_out=0")


def drawn(model, out, *words):
    """The images that are drawn of two captions, (2, H, W, 3)."""
    out.mkdir(exist_ok=True)
    (out / "captions.txt").write_text("a red cat\na blue dog\n")
    stage_of(model, out, f"prompts={out / 'captions.txt'}", "data.held_out=0", *words)
    return np.stack([np.asarray(Image.open(out / f"drawn/0000{i}.png")) for i in range(2)]).astype(float)


def expected(model, like, scale, **more):
    made = Pipeline(["a red cat", "a blue dog"], model, **more)
    height, width = like.shape[1:3]
    found = made.generate(seed=[3, 4], height=height, width=width, guidance_scale=scale)
    return np.stack(list(map(np.asarray, found))).astype(float)


def test_images_are_drawn_by_the_teacher(tiny_folder, guided, tmp_path, monkeypatch):
    """The model with its LoRA, guided as it is asked; on a GPU too, where it is read again in 16 bits."""
    words = (f"init={guided}", "guidance_scale=null")
    found = drawn(tiny_folder, tmp_path / "run", *words)
    right, wrong = expected(tiny_folder, found, 1, lora=guided), expected(tiny_folder, found, 1)
    assert np.array_equal(found, right) and np.abs(found - wrong).mean() > 2
    monkeypatch.setattr(prior, "pick_dtype", lambda *_: torch.bfloat16)
    half = drawn(tiny_folder, tmp_path / "half", *words)
    assert 0 < np.abs(half - right).mean() < 0.2 * np.abs(half - wrong).mean()


def test_images_are_drawn_with_the_teachers_guidance(tiny_folder, guided, tmp_path):
    """Also by a model that will be told its scale; another one's images are not taken for them."""
    told = ("train=full", "method=guidance", "guidance_range=[1,7]", "guidance_scale=null")
    for words, scale, more in (
        (("guidance_scale=2",), 2, {}),
        (told, 4, {}),
        (("guidance_scale=4", f"init={guided}"), 4, {"lora": guided}),
    ):
        found = drawn(tiny_folder, tmp_path, *words)
        assert np.array_equal(found, expected(tiny_folder, found, scale, **more)), words


def distilled_dry(model, folder, words, capsys):
    distill(model, folder / "dry", *words, dry_run=True)
    assert not (folder / "dry").exists()
    return capsys.readouterr().err


def on_meta(batch):
    moved = {name: value.to(META) for name, value in vars(batch).items() if name in ("latents", "ends")}
    return dataclasses.replace(batch, **moved, cond=batch.cond.to(META, torch.float32))


@pytest.mark.parametrize("method", ["guidance", "consistency", "trajectory", "range"])
def test_no_step_waits_for_the_device(method, tiny_folder, images, tmp_path, small_pieces):
    """Nor is there a tensor that the device misses."""
    told = ("train=full", "method=guidance", "guidance_range=[1,5]", "guidance_scale=null")
    words = told if method == "range" else (f"method={method}",)
    stage = stage_of(tiny_folder, tmp_path, *WAYS, *words, f"data={images}", "intervals=[4,4]", "validation=1")
    batch = on_meta(next(stage.batches(0)))
    stage.device, stage.average = META, stage.module.to(META)
    stage.teacher.to(META)
    stage.uncond = stage.uncond.to(META, torch.float32)
    with Waits() as counted:
        assert stage.loss(batch, 0, 0).device == META
        if method == "trajectory":
            assert stage._trajectories(batch).device == META
    assert counted.launches and not +counted.waits


def test_a_base_in_16_bits_is_asked_in_autocast(tiny_folder, images, tmp_path, small_pieces, monkeypatch):
    """As on a GPU: the teacher's trajectories, losses and scores, and the grid; the autoencoder stays in fp32."""
    half = lambda *_: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(base_model, "frozen_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(distilling, "drawing_precision", half, raising=False)
    stage = stage_of(tiny_folder, tmp_path, *WAYS, f"data={images}", "validation=1", "samples=1")
    assert stage.teacher.conv_in.weight.dtype == torch.bfloat16
    decode, seen = stage.model.vae.decode, []
    monkeypatch.setattr(
        stage.model.vae, "decode", lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or decode(*given)
    )
    with half():
        assert stage.loss(next(stage.batches(0)), 0, 0).isfinite()
        assert stage.validate(stage.module, 0)["validation_loss"] > 0
        assert stage.sample_grid(stage.module) is not None
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("precision", "kept"), [("auto", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_precision_is_that_of_the_frozen_base_too(precision, kept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert frozen_dtype(DistillSettings(precision=precision).network, torch.device("cuda")) is kept


@pytest.mark.slow
def test_scenes_are_data_too(tiny_folder, tmp_path, one_thread):
    out = distill(tiny_folder, tmp_path / "run", "latent_pool=256", "validation=2", "steps=1", "method=guidance")
    assert scores(out)[0]["validation_loss"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["guidance_range=[1,5]"], "guidance_range: needs train=full"),
        (["intervals=[4,2]"], "intervals: must be 1 to 1024"),
        (["segments=0"], "segments: must be 1 to 50"),
        (["method=trajectory", "teacher_steps=6"], "teacher_steps: must be a multiple of segments=4"),
        (["drawn=5"], "drawn: needs prompts"),
        (["targets=[to_x]"], "no layer named 'to_x'"),
        (["methud=guidance"], "did you mean 'method'"),
        (["train=full", "init=x"], "cannot be continued with train=full"),
    ],
)
def test_what_cannot_be_is_refused_before_work(tiny_folder, images, tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        distill(tiny_folder, tmp_path / "run", f"data={images}", *words)
    assert not (tmp_path / "run").exists()


def test_the_command(tiny_folder, images, tmp_path, capsys):
    line = ["distill", str(tiny_folder), "-o", str(tmp_path / "run"), f"data={images}", *QUICK, "--dry-run"]
    assert main(line) == 0 and "method: consistency" in capsys.readouterr().err
    assert main(["distill", "-o", str(tmp_path / "run"), "--config", "emoji/unet"]) == 2
    assert "no packaged settings 'emoji/unet'" in capsys.readouterr().err


def test_shipped_settings_are_for_the_shipped_model(tmp_path):
    guided = read_distill(None, tmp_path, "emoji/guided", (), None)
    fast = read_distill(None, tmp_path, "emoji/fast", (), None)
    assert guided.model == fast.model == "default" and guided.data == fast.data
    assert (guided.method, fast.method, fast.segments) == ("guidance", "trajectory", 4)
