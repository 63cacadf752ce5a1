"""SD3 and FLUX through our Pipeline: diffusers' images from equal latents, and what is told of settings."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Pipeline
from ldm.checkpoint import load_model, save_model
from ldm.checkpoint.convert import convert
from ldm.checkpoint.inspect import inspect
from ldm.checkpoint.inspect_text import as_text
from ldm.diffusion.inpaint import img2img_sigmas
from ldm.errors import ConfigError
from ldm.images import to_tensor
from ldm.render.drawing.runner import render
from tests.flow_models import CHANNELS, KINDS, SHIFTS, SIDE, TOKENS, build, packed

PROMPTS, NEGATIVES = ["a red cat", "a dog and a blue dog"], ["blue", "a dog on red"]
SIZE = {"height": SIDE, "width": SIDE + 32}
SAMPLERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun_flow": "FlowMatchHeunDiscreteScheduler"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (diffusers' pipeline, the folder that it saved, our model of it), made when asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            pipe, folder = build(kind), tmp_path_factory.mktemp("flow") / kind
            pipe.save_pretrained(folder)
            made[kind] = pipe, folder, load_model(folder, "cpu", "fp32", cache=False)
        return made[kind]

    return of


def noise():
    shape = (len(PROMPTS), CHANNELS, SIZE["height"] // 4, SIZE["width"] // 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def theirs(pipe, sampler, negatives, **settings):
    """Images (B, H, W, 3) in 0..255 of diffusers' pipeline."""
    import diffusers

    flux = type(pipe).__name__ == "FluxPipeline"
    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipe.scheduler.config)
    latents = packed(noise()) if flux else noise()
    out = pipe(
        PROMPTS,
        negative_prompt=negatives,
        latents=latents,
        output_type="np",
        max_sequence_length=TOKENS if pipe.components.get("tokenizer_3") or flux else 256,
        **SIZE,
        **settings,
    )
    return 255 * out.images


def ours(model, sampler, negatives, **settings):
    pipe = Pipeline(PROMPTS, model, negative_prompt=negatives)
    return pixels(pipe.generate(latents=noise(), sampler=sampler, **SIZE, **settings))


def pixels(images):
    return np.stack([np.asarray(image, dtype=float) for image in images])


SETTINGS = {
    "sd3": {"guidance_scale": 5.0},
    "sd35": {"guidance_scale": 5.0},
    "sd3_without_t5": {"guidance_scale": 5.0},
    "flux_dev": {"guidance_scale": 3.5, "true_cfg_scale": 4.0},
    "flux_schnell": {"guidance_scale": 0.0, "true_cfg_scale": 4.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_diffusers(models, kind):
    pipe, _, model = models(kind)
    settings = {"num_inference_steps": 4, **SETTINGS[kind]}
    images = theirs(pipe, "euler", NEGATIVES, **settings)
    assert np.abs(ours(model, "euler", NEGATIVES, **settings) - images).max() <= 1
    # that could not be by chance: images have contrast, and what is wrong shows
    assert images.std() > 25 and np.abs(images[0] - images[1]).max() > 5
    for changed in (
        {"negatives": NEGATIVES[::-1]},
        {
            "model": dataclasses.replace(
                model, schedule=dataclasses.replace(model.schedule, flow_shift=1.7, size_shift=None)
            )
        },
        {"true_cfg_scale": 3.0} if kind.startswith("flux") else {"guidance_scale": 4.0},
        {"guidance_scale": 2.0} if kind == "flux_dev" else {"num_inference_steps": 5},
    ):
        call = {"model": model, "negatives": NEGATIVES, **settings, **changed}
        wrong = ours(call.pop("model"), "euler", call.pop("negatives"), **call)
        assert all(np.abs(a - b).max() > 3 for a, b in zip(wrong, images)), changed


def test_heun_flow_is_that_of_diffusers(models):
    pipe, _, model = models("sd3")  # FluxPipeline gives its own steps, which diffusers' Heun does not take
    settings = {"num_inference_steps": 3, **SETTINGS["sd3"]}
    images = theirs(pipe, "heun_flow", NEGATIVES, **settings)
    assert np.abs(ours(model, "heun_flow", NEGATIVES, **settings) - images).max() <= 1
    assert np.abs(ours(model, "euler", NEGATIVES, **settings) - images).max() > 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_diffusers(models, kind):
    pipe, _, model = models(kind)
    settings = {"device": "cpu", "max_sequence_length": 256 if kind == "sd3_without_t5" else TOKENS}
    if kind.startswith("flux"):
        states, pooled, _ = pipe.encode_prompt(PROMPTS, None, **settings)
    else:
        states, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, **settings)
    found = model.text.encode(PROMPTS)
    assert torch.allclose(found.states, states, atol=1e-5) and torch.allclose(found.pooled, pooled, atol=1e-5)
    together = model.text.encode_together(PROMPTS)
    assert found.mask is None and torch.allclose(together.states, states, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd35", "flux_dev"])
def test_an_image_is_the_same_alone_in_a_batch_offloaded_and_from_the_folder(models, kind):
    _, folder, model = models(kind)
    settings = {"num_inference_steps": 3, "seed": 7, **SIZE, **SETTINGS[kind]}
    several = Pipeline(PROMPTS, model, negative_prompt=NEGATIVES).generate(**settings, num_images=2)
    alone = Pipeline(PROMPTS[1], folder, negative_prompt=NEGATIVES[1], device="cpu", dtype="fp32", offload=True)
    assert np.array_equal(pixels(several)[2], pixels(alone.generate(**settings))[0])
    metadata = several.metadata[2]
    assert metadata["guidance_scale"] == SETTINGS[kind]["guidance_scale"] and metadata["sampler"] == "euler"
    assert metadata.get("true_cfg_scale") == SETTINGS[kind].get("true_cfg_scale")
    assert metadata["schedule"]["_class_name"] == "FlowMatchEulerDiscreteScheduler"


def test_steps_that_cfg_zero_skips_are_of_guided_images_alone(models):
    settings = {"num_inference_steps": 3, "guidance": "cfg_zero", **SIZE}
    pipe = Pipeline(PROMPTS[0], models("sd35")[2])
    several = pipe.generate(**settings, num_images=2, seed=7, guidance_scale=[1, 4])
    for i, scale in enumerate((1, 4)):
        assert np.array_equal(
            pixels(several)[i], pixels(pipe.generate(**settings, seed=7 + i, guidance_scale=scale))[0]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_diffusers_reads_the_folder_and_draws_the_same(models, kind, tmp_path):
    pipe, folder, model = models(kind)
    saved = save_model(model, tmp_path / "saved", dtype="fp32", max_shard_mb=0.1)
    again = load_model(saved, "cpu", "fp32", cache=False)
    assert again.schedule == model.schedule and again.unet.config == model.unet.config
    for one, other in zip((model.unet, *model.text.modules), (again.unet, *again.text.modules), strict=True):
        pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3") if kind == "sd3_without_t5" else ())  # diffusers asks
    read = type(pipe).from_pretrained(saved, local_files_only=True, **absent)
    read.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, **SETTINGS[kind]}
    images = theirs(pipe, "euler", NEGATIVES, **settings)
    assert np.abs(theirs(read, "euler", NEGATIVES, **settings) - images).max() <= 1
    index, before = (json.loads((root / "model_index.json").read_text()) for root in (saved, folder))
    assert index["_class_name"] == before["_class_name"] and index["transformer"] == before["transformer"]


def test_the_shift_depends_on_the_size(models):
    import diffusers

    schedule = models("flux_dev")[2].schedule
    peer = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SHIFTS)
    for tokens in (256, 1024, 4096, 8100):
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
        peer.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=mu)
        sigmas = schedule.sigmas(5, tokens=tokens).double()
        assert torch.allclose(sigmas / (1 + sigmas), peer.sigmas.double(), atol=2e-6)
        assert torch.allclose(schedule.timestep(sigmas[:-1]), peer.timesteps, atol=1e-3)


def test_what_a_prompt_and_settings_cannot_be_is_told_before_a_weight_is_read(models, capsys):
    dev, schnell, sd3 = (models(kind)[1] for kind in ("flux_dev", "flux_schnell", "sd3"))
    few = {"num_inference_steps": 1, "seed": 1, **SIZE}
    images = Pipeline("a cat", dev, negative_prompt="blue", device="cpu").generate(**few)
    assert "true_cfg_scale" in capsys.readouterr().err and images.metadata[0]["guidance_scale"] == 3.5
    without = Pipeline("a cat", dev, device="cpu").generate(**few)
    assert np.array_equal(pixels(images), pixels(without)) and "negative" not in capsys.readouterr().err
    for folder, settings, said in (
        (dev, {"height": SIDE + 4}, "not a multiple of 8"),
        (schnell, {"guidance_scale": 3.5}, "takes no scale"),
        (sd3, {"true_cfg_scale": 2.0}, "is for FLUX"),
        (sd3, {"guidance": "pag"}, "for U-Nets"),
        (sd3, {"height": 512}, "larger than the 48x48"),
        (sd3, {"sampler": "dpm2"}, "does not work with flow"),
        (dev, {"clip_skip": 1}, "clip_skip"),
        (dev, {"prompt": "a (red:1.3) cat"}, "reads with T5"),
    ):
        call = {**few, **settings}
        with pytest.raises(ConfigError, match=said):
            Pipeline(call.pop("prompt", "a cat"), folder, device="cpu").generate(**call)
    with pytest.raises(ConfigError, match="predicts the flow"):
        Pipeline("a cat", sd3, prediction_type="epsilon")


def test_weights_in_prompts_act_where_clip_reads_alone(models):
    model = models("sd3_without_t5")[2]
    plain, weighted = (
        Pipeline(text, model).generate(num_inference_steps=2, seed=1)[0] for text in ("red cat", "(red:1.5) cat")
    )
    assert plain.tobytes() != weighted.tobytes()


@pytest.mark.parametrize("kind", ["sd3", "flux_dev"])
def test_images_are_edited(models, kind):
    model = models(kind)[2]
    drawn = Pipeline(PROMPTS[0], model).generate(num_inference_steps=2, seed=1, **SIZE)[0]
    mask = Image.new("L", drawn.size, 0)
    mask.paste(255, (0, 0, 32, SIZE["height"]))
    edit = {"num_inference_steps": 4, "seed": 2, "image": drawn, "strength": 0.5}
    changed = np.asarray(Pipeline(PROMPTS[1], model).generate(**edit)[0])
    painted = np.asarray(Pipeline(PROMPTS[1], model).generate(**edit, mask_image=mask)[0])
    before = np.asarray(drawn)
    assert (changed[:, 40:] != before[:, 40:]).any() and np.array_equal(painted[:, 32:], before[:, 32:])
    assert (painted[:, :32] != before[:, :32]).any()
    whole = Pipeline(PROMPTS[1], model).generate(**{**edit, "strength": 1.0, "num_images": 2})
    one = Pipeline(PROMPTS[1], model).generate(**{**edit, "strength": 1.0, "seed": 3})
    assert np.array_equal(pixels(whole)[1], pixels(one)[0])
    larger = Pipeline(PROMPTS[0], model).generate(num_inference_steps=2, seed=1, hires_scale=1.5, **SIZE)[0]
    assert larger.size == (144, 96)


@pytest.mark.parametrize("kind", ["sd3", "flux_dev"])
def test_image_to_image_is_that_of_diffusers(models, kind):
    import diffusers

    pipe, _, model = models(kind)
    drawn = Pipeline(PROMPTS[0], model).generate(num_inference_steps=2, seed=1, **SIZE)[0]
    pipeline = diffusers.FluxImg2ImgPipeline if kind == "flux_dev" else diffusers.StableDiffusion3Img2ImgPipeline
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    peer = pipeline.from_pipe(pipe)
    peer.set_progress_bar_config(disable=True)
    first = torch.randn(
        (1, CHANNELS, SIZE["height"] // 4, SIZE["width"] // 4), generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():  # the mean of the latents, as ours takes it, then the noise at the first level
        latents = model.vae.encode(to_tensor(drawn))
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5}
    sigmas = img2img_sigmas(model.schedule.sigmas(4, tokens=SIZE["height"] * SIZE["width"] // 64), 0.5)
    t = float(sigmas[0] / (1 + sigmas[0]))
    start = (1 - t) * latents + t * first
    size = SIZE if kind == "flux_dev" else {}
    kept = {}
    peer.prepare_latents = lambda *args, **kwargs: kept.setdefault("x", prepared(kind, peer, start))
    out = peer(PROMPTS[0], image=drawn, output_type="np", max_sequence_length=TOKENS, **call, **size)
    mine = Pipeline(PROMPTS[0], model, negative_prompt="").generate(image=drawn, latents=first, **call)
    assert np.abs(255 * out.images - pixels(mine)).max() <= 1


def prepared(kind, peer, start):
    if kind != "flux_dev":
        return start
    height, width = start.shape[-2:]
    return packed(start), peer._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)


def test_a_prompt_file_draws_and_an_image_is_drawn_again_from_its_file(models, tmp_path):
    _, folder, _ = models("flux_dev")
    lines = "--prompt a red cat --negative_prompt blue --true_cfg_scale 3 --steps 2 --seed 4 --size 96x64\n"
    lines += f"--prompt a dog --steps 2 --seed 5 --size 96x64 --model {folder}\n"
    (tmp_path / "prompts.txt").write_text(lines)
    out = render(tmp_path / "prompts.txt", tmp_path / "out", model=str(folder), device="cpu", dtype="fp32")
    files = sorted((tmp_path / "out").rglob("*.png"))
    assert len(files) == 2, out
    settings = {"num_inference_steps": 2, "seed": 4, "true_cfg_scale": 3.0, **SIZE}
    direct = Pipeline("a red cat", folder, negative_prompt="blue", device="cpu", dtype="fp32").generate(**settings)
    drawn = [np.asarray(Image.open(file), dtype=float) for file in files]
    at = next(i for i, one in enumerate(drawn) if np.array_equal(one, pixels(direct)[0]))
    again = render(None, tmp_path / "again", sources=[files[at]], model=str(folder), device="cpu")
    (file,) = (tmp_path / "again").rglob("*.png")
    assert np.array_equal(np.asarray(Image.open(file), dtype=float), drawn[at]), again


def test_a_folder_is_inspected_and_written_again(models, tmp_path):
    for kind, family in (("sd3", "sd3"), ("sd35", "sd35"), ("flux_dev", "flux-dev"), ("flux_schnell", "flux-schnell")):
        _, folder, _ = models(kind)
        found = inspect(folder)
        assert (found["family"], found["prediction_type"], found["latent_channels"]) == (family, "flow", CHANNELS)
        assert found["in_channels"] == CHANNELS and "transformer" in found["parts"] and as_text(found)
    _, folder, model = models("sd3_without_t5")
    again = load_model(convert(folder, tmp_path / "folder"), "cpu", "fp32", cache=False)
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), again.unet.parameters(), strict=True))
