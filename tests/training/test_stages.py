"""The three stages in a row, on the user's own pictures and on drawn scenes: each leaves what the next one reads."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint import default_folder
from ldm.checkpoint.parts import load_text_from, load_vae_from
from ldm.cli import main
from ldm.errors import CheckpointError, ConfigError, DataError, LdmError
from ldm.training import train
from ldm.training.checkpoints import reading
from ldm.training.checkpoints import state as states
from ldm.training.data import read_images
from ldm.training.loop import loop
from ldm.training.settings import read_settings
from ldm.training.stages.unet import UNetStage
from tests.training.conftest import SCHEDULE, TINY_UNET, threads

COLOURS = {"red": (210, 40, 40), "blue": (50, 100, 200), "green": (60, 160, 70), "white": (250, 250, 250)}
V = "schedule.prediction_type=v_prediction"
COMMON = {"batch_size": 4, "learning_rate": 0.002, "workers": 0, "precision": "fp32", "device": "cpu", "warmup": 2}
COMMON |= {"validation": 8, "data": {"resolution": 32}}
AUTOENCODER = {
    **COMMON,
    "stage": "autoencoder",
    "steps": 12,
    "crop": 16,
    "crops": 2,
    "crop_until": 0.5,
    "model": {
        "block_out_channels": [8, 8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {
    **COMMON,
    "stage": "text",
    "steps": 6,
    "latent_pool": 256,
    "vocabulary": 560,
    "max_length": 24,
    "tokenizer_captions": 50,
    "model": TOWER,
    "image_tower": {**TOWER, "patch_size": 1},
}
UNET = {
    **COMMON,
    "stage": "unet",
    "steps": 4,
    "latent_pool": 256,
    "renew": 2,
    "sample_steps": 2,
    "schedule": SCHEDULE,
    "model": TINY_UNET,
}


def picture_folder(folder, count):
    """`count` captioned pictures of different shapes."""
    folder.mkdir()
    lines = []
    for i in range(count):
        name, rgb = list(COLOURS.items())[i % 4]
        Image.new("RGB", (40 + 8 * (i % 3), 48), rgb).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {name} picture, number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def three_stages(runs, *overrides):
    """Autoencoder, text tower, U-Net; returns the complete model's folder."""
    for name, settings in (("vae", AUTOENCODER), ("text", TEXT), ("unet", UNET)):
        (runs / f"{name}.json").write_text(json.dumps(settings))
    with threads(1):
        train(runs / "vae.json", runs / "vae", overrides)
        train(runs / "text.json", runs / "text", [f"vae={runs / 'vae'}", *overrides])
        return train(runs / "unet.json", runs / "unet", [f"vae={runs / 'vae'}", f"text={runs / 'text'}", *overrides])


def last_scores(run):
    return json.loads((run / "scores.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def on_pictures(tmp_path_factory):
    """The runs of the three stages on twelve captioned pictures."""
    runs = tmp_path_factory.mktemp("runs")
    three_stages(runs, f"data.folder={picture_folder(runs / 'pictures', 12)}")
    return runs


def test_three_stages_on_own_pictures_end_in_a_model_that_draws(on_pictures):
    images = ldm.Pipeline("a red picture", model=on_pictures / "unet" / "model").generate(seed=1)
    assert images[0].size == (32, 32)
    record = images.metadata[0]
    assert (record["num_inference_steps"], record["sampler"], record["guidance_scale"]) == (2, "ddim", 4.0)


def test_the_card_tells_what_the_run_knows(on_pictures, tmp_path):
    card = (on_pictures / "unet" / "model" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert 'trained_on: "cpu"' in head and '"num_inference_steps": 2' in head
    recipe = json.loads(text.split("```json\n")[1].split("```")[0])
    settings = json.loads((on_pictures / "unet" / "settings.json").read_text())
    assert recipe.keys() == settings.keys() and recipe["steps"] == settings["steps"]
    assert str(on_pictures) in json.dumps(settings) and str(on_pictures) not in card  # names, never paths
    assert recipe["data"]["folder"] == "pictures" and "`pictures`" in text and "Noto Color Emoji" not in text
    assert f"validation_loss: {last_scores(on_pictures / 'unet')['validation_loss']:.4g}" in text


def test_every_stage_leaves_scores_curve_and_pictures(on_pictures):
    for name, score in (("vae", "psnr"), ("text", "text_to_image"), ("unet", "validation_loss"), ("unet", "x0_error")):
        assert score in last_scores(on_pictures / name)
        assert (on_pictures / name / "settings.json").is_file()
    assert "synonyms" not in last_scores(on_pictures / "text")  # known for drawn scenes alone
    for name in ("vae", "unet"):
        assert list((on_pictures / name / "samples").glob("step-*.png"))


def test_the_autoencoder_stays_the_same_through_the_later_stages(on_pictures):
    first = load_vae_from(on_pictures / "vae" / "model").module.state_dict()
    last = load_vae_from(on_pictures / "unet" / "model").module.state_dict()
    assert all(torch.equal(value, last[name]) for name, value in first.items())
    words = load_text_from(on_pictures / "text" / "model").model.state_dict()
    kept = load_text_from(on_pictures / "unet" / "model").model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in words.items())


def test_diffusers_draws_the_same_from_the_whole_model(on_pictures):
    from diffusers import StableDiffusionPipeline

    model = on_pictures / "unet" / "model"
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    noise, settings = torch.Generator("cpu").manual_seed(7), {"num_inference_steps": 4, "guidance_scale": 3.0}
    size, latents = {"height": 32, "width": 32}, []
    expected = pipe("a blue picture", generator=noise, output_type="latent", **size, **settings).images
    ours = ldm.Pipeline("a blue picture", model=model, dtype="fp32")
    (drawn,) = ours.generate(seed=7, callback=lambda i, x, x0: latents.append(x), **settings)
    torch.testing.assert_close(latents[-1], expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    with torch.no_grad():
        decoded = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
    (image,) = pipe.image_processor.postprocess(decoded)
    assert np.abs(np.asarray(image, int) - np.asarray(drawn, int)).max() <= 1


def test_starting_from_another_run_takes_its_exact_average(on_pictures, tmp_path):
    from ldm.training.stages.start import start_from

    before = start_from(str(on_pictures / "unet"), "unet").state_dict()
    given = [f"vae={on_pictures / 'vae'}", f"text={on_pictures / 'text'}", f"data.folder={on_pictures / 'pictures'}"]
    with threads(1):
        model = train(
            on_pictures / "unet.json",
            tmp_path / "more",
            [*given, f"init={on_pictures / 'unet'}", "steps=1", "learning_rate=1e-30"],
        )
    from ldm.checkpoint.parts import load_unet_from

    after = load_unet_from(model).state_dict()
    assert all(torch.equal(value.bfloat16(), after[name].bfloat16()) for name, value in before.items())


def test_decoder_alone_leaves_the_latents_as_they_were(on_pictures, tmp_path):
    given = [f"data.folder={on_pictures / 'pictures'}", f"init={on_pictures / 'vae'}", "freeze_encoder=true"]
    with threads(1):
        model = train(on_pictures / "vae.json", tmp_path / "vae", [*given, "crop=0", "crops=1"])
    before = load_vae_from(on_pictures / "vae" / "model").module.state_dict()
    after = load_vae_from(model).module.state_dict()
    encoder = [name for name in before if name.startswith(("encoder.", "quant_conv."))]
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert not torch.equal(before["decoder.conv_out.weight"], after["decoder.conv_out.weight"])


def test_an_autoencoder_without_1x1_convolutions_is_one_to_start_from(on_pictures, tmp_path):
    """As SD3's and FLUX's."""
    given = [f"data.folder={on_pictures / 'pictures'}", "crop=0", "crops=1", "steps=2"]
    given += ["model.use_quant_conv=false", "model.use_post_quant_conv=false"]
    with threads(1):
        first = train(on_pictures / "vae.json", tmp_path / "first", given)
        train(on_pictures / "vae.json", tmp_path / "whole", [*given, f"init={first}"])
        frozen = train(on_pictures / "vae.json", tmp_path / "frozen", [*given, f"init={first}", "freeze_encoder=true"])
    before, after = load_vae_from(first), load_vae_from(frozen)
    old, new = before.module.state_dict(), after.module.state_dict()
    assert all(torch.equal(value, new[name]) for name, value in old.items() if name.startswith("encoder."))
    assert not torch.equal(old["decoder.conv_out.weight"], new["decoder.conv_out.weight"])
    assert before.scaling_factor == after.scaling_factor != 1 and before.shift_factor == after.shift_factor != 0


def test_sizes_fit_the_autoencoder_to_start_from(on_pictures, tmp_path):
    settings = {key: value for key, value in AUTOENCODER.items() if key not in ("model", "crop", "crops")}
    (tmp_path / "vae.json").write_text(json.dumps(settings))
    given = [f"init={on_pictures / 'vae'}", f"data.folder={on_pictures / 'pictures'}"]
    for words, said in (
        (["data.resolution=36", "data.bucket_step=4"], "data.resolution: 36 is not a multiple of the autoencoder's 8"),
        (["data.bucket_step=4"], "data.bucket_step: 4 is not a multiple of the autoencoder's 8"),
        (["crop=12"], "crop: must be 0 to 32 by 8"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(tmp_path / "vae.json", tmp_path / "run", [*given, *words])


def test_three_stages_on_drawn_scenes(tmp_path):
    model = three_stages(tmp_path, "data.scenes.objects=everyday", "steps=2", "validation=4")
    assert 0 <= last_scores(tmp_path / "text")["synonyms"] <= 1
    assert ldm.Pipeline("a cat", model=model).generate(num_inference_steps=1, seed=0)[0].size == (32, 32)


@pytest.mark.parametrize("count", [1, 3])
def test_very_few_pictures_are_enough(count, tmp_path):
    model = three_stages(tmp_path, f"data.folder={picture_folder(tmp_path / 'pictures', count)}", "steps=1")
    assert (model / "model_index.json").is_file()


VAE = default_folder()  # any model will do


def test_what_is_missing_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["emoji/text"], "vae: is needed: the run of `ldm train emoji/autoencoder`"),
        (["emoji/unet", "vae=x"], "text: is needed: the run of `ldm train emoji/text`"),
        (["emoji/text", f"vae={tmp_path / 'empty'}"], "holds no model"),
        (["emoji/text", "vae=/nowhere/run"], "/nowhere/run: holds no model"),
        (["emoji/autoencoder", "data=/nowhere/pictures"], "/nowhere/pictures"),
        (["emoji/autoencoder", f"data={tmp_path / 'empty'}"], "empty"),
        (["emoji/autoencoder", "data.font=/nowhere/font.ttf"], "/nowhere/font.ttf"),
        (["emoji/autoencoder", "data.scenes.objcts=all"], "did you mean 'objects'"),
        (["emoji/autoencoder", "data.scenes.held_out=true"], "data.scenes.held_out: is set by the stages"),
        (["emoji/autoencoder", "model.latent_chanels=4"], "did you mean 'latent_channels'"),
        (["emoji/autoencoder", "data.resolution=100"], "100 is not a multiple of the step 8; use 96"),
        (["emoji/autoencoder", "crops=3"], "crops: must divide batch_size 16"),
        (["emoji/autoencoder", "crop=200"], "crop: must be 0 to 128"),
        (["emoji/autoencoder", "compile=true"], "compile"),
        (["emoji/autoencoder", "kl=-1e-6"], "kl: must not be negative, got -1e-06"),
        (["emoji/autoencoder", "l1=0", "mse=0", "gradient=0"], "l1: no image is learned without it, mse or gradient"),
        (["emoji/autoencoder", "crop_until=2"], "crop_until: must be 0 to 1"),
        (["emoji/text", f"vae={VAE}", "max_length=2"], "max_length: must be at least 3"),
        (["emoji/text", f"vae={VAE}", "model.hiden_size=3"], "did you mean 'hidden_size'"),
        (["emoji/text", f"vae={VAE}", "init=x"], "x: holds no model"),
        (["emoji/unet", f"vae={VAE}", f"text={VAE}", "model.layers=2"], "unknown setting 'layers'"),
        (["emoji/unet", f"vae={VAE}", f"text={VAE}", "schedule.spacing=trailling"], "did you mean 'trailing'"),
        (["emoji/unet", f"vae={VAE}", f"text={VAE}", "sampler=eular"], "did you mean 'euler'"),
        (["emoji/unet", f"vae={VAE}", f"text={VAE}", "sampler=heun_flow", V], "heun_flow is for flow models"),
    ):
        assert main(["train", *words, "-o", str(tmp_path / "run")]) == 2, words
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists(), words
        assert main(["train", *words, "-o", str(tmp_path / "run"), "--dry-run"]) == 2
        capsys.readouterr()


def test_pictures_without_captions_are_refused(tmp_path):
    folder = picture_folder(tmp_path / "pictures", 2)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(LdmError):
        train("emoji/autoencoder", tmp_path / "run", [f"data={folder}"])
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(DataError):
        train("emoji/autoencoder", tmp_path / "run", [f"data={folder}"])


@pytest.mark.parametrize("name", ["vae", "text"])
def test_a_resumed_stage_equals_an_uninterrupted_one(name, on_pictures, tmp_path):
    """Its moments too: those of the autoencoder lie in memory as channels-last, as its weights do."""
    config, given = on_pictures / f"{name}.json", [f"data.folder={on_pictures / 'pictures'}", "decay_from=1", "ema=0.5"]
    given += [f"vae={on_pictures / 'vae'}"] if name == "text" else ["crop_until=1"]
    with threads(1):
        train(config, tmp_path / "whole", [*given, "steps=6"])
        train(config, tmp_path / "halves", [*given, "steps=3"])
        train(config, tmp_path / "halves", [*given, "steps=6"], resume="latest")
    whole, halves = (
        (tmp_path / run / "checkpoints" / "step-00000006" / "state.safetensors").read_bytes()
        for run in ("whole", "halves")
    )
    assert whole == halves


def test_a_text_encoder_is_trained_along_and_resumed_to_the_bit(on_pictures, tmp_path):
    given = [f"{name}={on_pictures / name}" for name in ("vae", "text")]
    given += [f"data.folder={on_pictures / 'pictures'}", "decay_from=1", "ema=0.5", "optimizer=muon", "text_rate=0.01"]
    with threads(1):
        train(on_pictures / "unet.json", tmp_path / "whole", [*given, "steps=4"])
        train(on_pictures / "unet.json", tmp_path / "halves", [*given, "steps=2"])
        train(on_pictures / "unet.json", tmp_path / "halves", [*given, "steps=4"], resume="latest")
    last = [tmp_path / run / "checkpoints" / "step-00000004" for run in ("whole", "halves")]
    whole, halves = ((folder / "state.safetensors").read_bytes() for folder in last)
    assert whole == halves
    state = reading.read_tensors(last[0])
    before = load_text_from(on_pictures / "text" / "model").model.state_dict()
    after = load_text_from(tmp_path / "whole" / "model").model.state_dict()
    for name, value in after.items():
        assert torch.equal(value, state[f"ema.text.{name}"].bfloat16().float()), name
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "q_proj.weight" in name)
    images = ldm.Pipeline("a red picture", model=tmp_path / "whole" / "model").generate(seed=1)
    assert images[0].size == (32, 32)
    settings = read_settings(on_pictures / "unet.json", [*given, f"init={tmp_path / 'whole'}", "model={}"])
    again = UNetStage(settings, tmp_path / "again", read_images(settings.data)).module["unet"].state_dict()
    assert all(torch.equal(value, state[f"ema.unet.{name}"]) for name, value in again.items())


def test_another_autoencoder_or_tokenizer_is_noticed_on_resuming(on_pictures, tmp_path):
    other = tmp_path / "vae"
    shutil.copytree(on_pictures / "vae" / "model", other / "model")
    data = f"data.folder={on_pictures / 'pictures'}"
    with threads(1):
        train(on_pictures / "text.json", tmp_path / "run", [f"vae={other}", data, "steps=1"])
        with (other / "model" / "manifest.json").open("a") as manifest:
            manifest.write("\n")
        with pytest.raises(CheckpointError, match="the vae is not the one that this run began with"):
            train(on_pictures / "text.json", tmp_path / "run", [f"vae={other}", data, "steps=2"], resume="latest")
        shutil.copy(on_pictures / "vae" / "model" / "manifest.json", other / "model")
        lines = (on_pictures / "pictures" / "metadata.jsonl").read_text().replace("picture", "drawing")
        shutil.copytree(on_pictures / "pictures", tmp_path / "pictures")
        (tmp_path / "pictures" / "metadata.jsonl").write_text(lines)
        changed = [f"vae={other}", f"data.folder={tmp_path / 'pictures'}", "steps=2"]
        with pytest.raises(CheckpointError, match="the tokenizer is not the one"):
            train(on_pictures / "text.json", tmp_path / "run", changed, resume="latest", allow_changed=["data"])


def test_a_picture_that_cannot_be_read_stops_the_run_with_all_before_it_saved(tmp_path, monkeypatch):
    """The pictures break after five steps; the worker may have read some batches ahead."""
    folder, taken, take_step = picture_folder(tmp_path / "pictures", 40), [], loop.take_step

    def step(stage, state, *args):
        if len(taken) == 5:
            for path in folder.glob("*.png"):
                path.write_bytes(path.read_bytes()[:60])
        outcome = take_step(stage, state, *args)
        taken.append(state.step)
        return outcome

    monkeypatch.setattr(loop, "take_step", step)
    (tmp_path / "vae.json").write_text(json.dumps({**AUTOENCODER, "steps": 400, "workers": 1}))
    with threads(1), pytest.raises(DataError) as stopped:
        train(tmp_path / "vae.json", tmp_path / "run", [f"data={folder}", "batch_size=2", "crops=1", "crop=0"])
    assert stopped.value.exit_code == 5 and "png" in str(stopped.value) and "Traceback" not in str(stopped.value)
    saved = states.checkpoints(tmp_path / "run")
    assert [states.step_of(path) for path in saved] == [taken[-1]] and 5 <= taken[-1] < 400


def test_the_words_of_the_captions_are_known_to_the_model(on_pictures):
    model = on_pictures / "unet" / "model"
    words = json.loads((model / "tokenizer" / "words.json").read_text())["words"]
    assert set(words) == {"a", "red", "blue", "green", "white", "picture", "number", *map(str, range(12))}
    images = ldm.Pipeline("a red zebra", model=model).generate(seed=1)
    assert images.metadata[0]["unknown_words"] == ["zebra"]


def test_another_network_than_that_of_init_is_refused(on_pictures, tmp_path):
    given = [f"vae={on_pictures / 'vae'}", f"text={on_pictures / 'text'}", f"data.folder={on_pictures / 'pictures'}"]
    with pytest.raises(ConfigError, match=r"model.block_out_channels: asks for .* leave it out"):
        more = [f"init={on_pictures / 'unet'}", "model.block_out_channels=[16,64]"]
        train(on_pictures / "unet.json", tmp_path / "run", [*given, *more])
    with pytest.raises(ConfigError, match=r"model.latent_channels: asks for 8"):
        more = [f"init={on_pictures / 'vae'}", "model.latent_channels=8", given[2]]
        train(on_pictures / "vae.json", tmp_path / "run", more)


def test_compiling_needs_a_compiler(on_pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "c++-that-is-not-there")
    with pytest.raises(ConfigError, match=r"compile: needs a C\+\+ compiler \(c\+\+-that-is-not-there\); install it"):
        given = [f"vae={on_pictures / 'vae'}", f"text={on_pictures / 'text'}", "compile=true"]
        train(on_pictures / "unet.json", tmp_path / "run", given)
