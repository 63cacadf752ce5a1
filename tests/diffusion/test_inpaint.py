"""Image-to-image, inpainting and variations against diffusers' pipelines and A1111's formula, with one tiny U-Net."""

import math
import warnings

import pytest
import torch
from sampler_cases import SD, build_peer, distance, gaussian

from ldm.diffusion.denoiser import denoiser, sample
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.inpaint import (
    Original,
    add_noise,
    img2img_sigmas,
    mask_known_region,
    slerp,
    steps_before,
    steps_left,
    with_mask,
)
from ldm.diffusion.names import FLOW_SAMPLERS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError

SIDE, STEPS, SCALE, SEEDS = 8, 8, 3.0, (3, 8)
COMPARED = ("ddim", "euler", "dpmpp_2m")
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True}
NOISE = torch.stack([torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
ORIGINAL = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.9
MASK = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
MASK[0, :, 2:6, 3:7] = True
MASK[1, :, :5, 4:] = True


def pixels(mask):
    """Latent-sized (B, 1, h, w) bool as a mask of pictures, in numbers from 0 to 1."""
    return mask.float().repeat_interleave(8, -1).repeat_interleave(8, -2)


class Text(torch.Tensor):
    """Hidden states (B, S, D) as a condition."""

    @property
    def inputs(self):
        return {"cond": self}

    @classmethod
    def cat(cls, parts):
        return torch.cat(list(parts)).as_subclass(cls)


def states(seed):
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)).as_subclass(Text)


def build_unet(channels):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(channels)
    unet = UNet2DConditionModel(
        in_channels=channels,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    return build_unet(4)


@pytest.fixture(scope="module")
def unet_of_nine():
    return build_unet(9)


@pytest.fixture(scope="module")
def autoencoder():
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return AutoencoderKL(**blocks, block_out_channels=[4] * 4, norm_num_groups=2, latent_channels=4).eval()


def predict(unet):
    def network(x, timesteps, cond):
        return unet(x, timesteps, encoder_hidden_states=cond.as_subclass(torch.Tensor)).sample

    return network


def theirs(kind, unet, autoencoder, name, config, strength, **extra):
    """Latents by a diffusers pipeline, begun at ORIGINAL (handed over as latents)."""
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    own = {"set_alpha_to_one": False} if name == "ddim" else {}
    scheduler = build_peer(name, timestep_spacing="trailing", steps_offset=1, **config, **own)
    pipe = kind(vae=autoencoder, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(
            prompt_embeds=states(1).as_subclass(torch.Tensor),
            negative_prompt_embeds=states(2).as_subclass(torch.Tensor),
            image=ORIGINAL,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
            **extra,
        ).images


def ours(network, name, schedule, strength, original, noise=None):
    sigmas = img2img_sigmas(schedule.sigmas(STEPS, name), strength)
    denoise = guided_denoiser(network, states(1), states(2), Guidance(scale=SCALE), schedule, sigmas)
    return sample(denoise, schedule, sigmas, NOISE, name, original=original, noise=noise)


def schedule_of(config):
    config = dict(config)
    return Schedule(config.pop("prediction_type", "epsilon"), **config, spacing="trailing")


BOTH = [SD, {**ZERO_SNR, "prediction_type": "v_prediction"}]


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("config", BOTH, ids=["epsilon", "v, zero terminal SNR"])
@pytest.mark.parametrize("name", COMPARED)
def test_image_to_image_equals_diffusers(unet, autoencoder, name, config, strength):
    from diffusers import StableDiffusionImg2ImgPipeline

    expected = theirs(StableDiffusionImg2ImgPipeline, unet, autoencoder, name, config, strength)
    found = ours(predict(unet), name, schedule_of(config), strength, Original(ORIGINAL))
    assert distance(found, expected) < 2e-4


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("config", BOTH, ids=["epsilon", "v, zero terminal SNR"])
@pytest.mark.parametrize("name", COMPARED)
def test_inpainting_with_an_ordinary_model_equals_diffusers(unet, autoencoder, name, config, strength):
    from diffusers import StableDiffusionInpaintPipeline

    masks = {"mask_image": pixels(MASK), "masked_image_latents": ORIGINAL}
    expected = theirs(StableDiffusionInpaintPipeline, unet, autoencoder, name, config, strength, **masks)
    original = Original(ORIGINAL, MASK, from_noise=strength == 1)
    found = ours(predict(unet), name, schedule_of(config), strength, original)
    assert distance(found, expected) < 2e-4
    outside = ~MASK.expand_as(found)
    assert torch.equal(found[outside], ORIGINAL[outside])
    assert (found - ORIGINAL)[~outside].abs().mean() > 0.1


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", COMPARED)
def test_inpainting_with_nine_channels_equals_diffusers(unet_of_nine, autoencoder, name, strength):
    from diffusers import StableDiffusionInpaintPipeline

    masked = ORIGINAL.flip(0)
    masks = {"mask_image": pixels(MASK), "masked_image_latents": masked}
    expected = theirs(StableDiffusionInpaintPipeline, unet_of_nine, autoencoder, name, SD, strength, **masks)
    network = with_mask(predict(unet_of_nine), MASK, masked)
    original = None if strength == 1 else Original(ORIGINAL)
    assert distance(ours(network, name, schedule_of(SD), strength, original), expected) < 2e-4


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_flow_begins_as_diffusers_does(unet, autoencoder, strength):
    from diffusers import StableDiffusionImg2ImgPipeline

    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    expected = theirs(StableDiffusionImg2ImgPipeline, unet, autoencoder, "dpmpp_2m", config, strength)
    found = ours(predict(unet), "dpmpp_2m", Schedule("flow"), strength, Original(ORIGINAL))
    assert distance(found, expected) < 2e-4


def cases():
    for name in SAMPLERS:
        if name != "heun_flow":
            yield name, Schedule(**SD, spacing="trailing")
            yield name, Schedule("v_prediction", **ZERO_SNR, spacing="trailing")
        if name in FLOW_SAMPLERS:
            yield name, Schedule("flow")


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name, schedule", cases())
def test_every_sampler_keeps_the_rest_and_shows_it_to_the_network_at_its_noise(name, schedule, strength):
    """With a denoiser that knows no neighbours, what is painted is what a run without a mask paints."""
    sigmas = img2img_sigmas(schedule.sigmas(8, name), strength)
    seen = []

    def denoise(x, sigma):
        seen.append((x, sigma[0].item()))
        return gaussian(x, sigma)

    def draw(i):
        return torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(i))

    original = Original(ORIGINAL, MASK)
    x = add_noise(ORIGINAL, sigmas, NOISE)
    whole = SAMPLERS[name](gaussian, x, sigmas, draw)
    found = SAMPLERS[name](mask_known_region(denoise, original, NOISE, sigmas), x, sigmas, draw)
    inside = MASK.expand_as(found)
    assert torch.equal(found[inside], whole[inside])
    if sigmas[-1] == 0:
        assert torch.allclose(found[~inside], ORIGINAL[~inside], atol=1e-6 if name != "heun" else 1e-3)
    for x, sigma in seen:
        assert torch.equal(x[~inside], (ORIGINAL + torch.tensor(sigma) * NOISE)[~inside])


def test_a_run_from_noise_sees_noise_alone_at_its_first_sigma():
    schedule = Schedule(**SD, spacing="trailing")
    sigmas = schedule.sigmas(4)
    seen = []

    def network(x, timesteps):
        seen.append(x / (1 / (sigmas[len(seen)] ** 2 + 1).sqrt()))
        return torch.zeros_like(x)

    sample(
        denoiser(network, schedule),
        schedule,
        sigmas,
        NOISE,
        "euler",
        original=Original(ORIGINAL, MASK, from_noise=True),
    )
    assert torch.allclose(seen[0], NOISE * sigmas[0])
    outside = ~MASK.expand_as(NOISE)
    assert torch.allclose(seen[1][outside], (ORIGINAL + sigmas[1] * NOISE)[outside], atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 25, 30, 50])
@pytest.mark.parametrize("strength", [0.05, 0.29, 1 / 3, 0.5, 0.58, 0.7, 0.8, 0.999, 1.0])
def test_strength_rounds_as_diffusers_does(n, strength):
    sigmas = torch.arange(n, -1.0, -1)
    steps = min(int(n * strength), n)
    if not steps:
        with pytest.raises(ConfigError, match=f"of {n} steps leaves none.*use at least") as caught:
            img2img_sigmas(sigmas, strength)
        assert len(img2img_sigmas(sigmas, float(caught.value.hint.split()[3].strip(",")))) > 1  # what it says does work
        return
    assert torch.equal(img2img_sigmas(sigmas, strength), sigmas[n - steps :])
    assert len(img2img_sigmas(sigmas, strength)) == steps + 1


@pytest.mark.parametrize("strength", [0.01, 0.05, 0.1, 0.29, 0.3, 1 / 3, 0.5, 0.55, 0.7, 0.999, 1.0])
def test_the_steps_of_which_so_many_are_left_are_the_fewest(strength):
    for left in (1, 2, 7, 10, 33, 100):
        n = steps_before(left, strength)
        assert steps_left(n, strength) == left and (n == 1 or int((n - 1) * strength) < left)


def test_blending_is_the_formula_of_a1111():
    """slerp of modules/rng.py, on one picture's (C, h, w), written out number by number."""
    low, high = (torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2))
    found = slerp(low, high, 0.3)
    for c in range(4):
        for w in range(5):
            a, b = low[c, :, w].tolist(), high[c, :, w].tolist()
            norms = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
            angle = math.acos(sum(x * y for x, y in zip(a, b)) / (norms[0] * norms[1]))
            for h in range(6):
                expected = (math.sin(0.7 * angle) * a[h] + math.sin(0.3 * angle) * b[h]) / math.sin(angle)
                assert found[c, h, w].item() == pytest.approx(expected, rel=1e-9)


def test_blending_ends_at_both_noises_and_keeps_their_spread():
    low, high = (torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(slerp(low, high, 0.0), low)
    assert torch.equal(slerp(low, high, 1.0), high)
    assert slerp(low, high, 0.5).std().item() == pytest.approx(1, abs=0.02)
    assert torch.allclose(slerp(low, low, 0.4), low)
