"""No evaluation of a sampler waits for the device, and no step of training more than once."""

import pytest
import torch

from ldm.diffusion.denoiser import sample, training_loss
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.inpaint import Original
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.nn.text import Conditioning
from ldm.pipeline.encode import Noise
from tests.conftest import build_tiny_model
from tests.waits import META, Waits

SHAPE = (2, 4, 4, 4)


@pytest.fixture(scope="module")
def unet():
    return build_tiny_model().unet.to(META)


def run(unet, sampler, schedule, kind="cfg", original=None):
    """The waits of a run of four steps on the device, beside those at its beginning."""
    cond, uncond = (Conditioning(torch.empty(2, 7, 32, device=META)) for _ in range(2))
    guidance = Guidance(kind=kind, scale=(4.0, 1.0), **({"pag_layers": ("mid",)} if kind == "pag" else {}))
    with torch.no_grad(), Waits() as counted:
        sigmas = schedule.sigmas(4, sampler)
        denoise = guided_denoiser(unet, cond, uncond, guidance, schedule, sigmas)
        noise = Noise([1, 2], SHAPE[1:], META)
        sample(denoise, schedule, sigmas, noise(), sampler, noise=noise, original=original)
    return counted


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_waits(unet, sampler):
    flow = sampler == "heun_flow"
    counted = run(unet, sampler, Schedule("flow") if flow else Schedule("v_prediction"))
    assert counted.launches and not +counted.waits


@pytest.mark.parametrize("kind", ["apg", "pag", "cfg_zero"])
def test_no_guidance_waits(unet, kind):
    assert not +run(unet, "euler", Schedule("flow"), kind).waits


def test_inpainting_does_not_wait(unet):
    original = Original(torch.empty(SHAPE, device=META), torch.empty(2, 1, 4, 4, dtype=torch.bool, device=META))
    assert not +run(unet, "dpmpp_2m", Schedule(), original=original).waits


def test_a_wait_is_counted():
    with Waits() as counted:
        torch.ones(2).to(META)
        torch.ones(2).to(META, non_blocking=True)
    assert dict(+counted.waits) == {"_to_copy.default": 1}
    with pytest.raises(Exception, match="meta"):
        float(torch.ones((), device=META))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_no_training_loss_waits(prediction_type):
    schedule = Schedule(prediction_type)
    times = torch.tensor([0.25, 0.5]) if schedule.is_flow else torch.tensor([3, 700])
    x0, noise = torch.empty(2, *SHAPE, device=META)
    with Waits() as counted:
        training_loss(lambda x, t: x * t[:, None, None, None], schedule, x0, noise, times, snr_gamma=5.0)
    assert counted.launches and not +counted.waits
