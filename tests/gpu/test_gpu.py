"""What only a GPU can show: `pytest -m gpu tests/gpu`. LDM_GPU_TESTS=cpu tries the tests themselves on a CPU."""

import os

import numpy as np
import pytest
import torch

from ldm import Pipeline
from ldm.diffusion.denoiser import sample
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError, ModelError
from ldm.nn.attention import BACKENDS, attention
from ldm.nn.text import Conditioning
from ldm.nn.vae import VAE
from ldm.pipeline.encode import Noise
from ldm.pipeline.engine import decode
from ldm.pipeline.placement import Placement
from tests.conftest import build_tiny_model, tiny_vae
from tests.training.toy import train_toy

DEVICE = torch.device(os.environ.get("LDM_GPU_TESTS", "cuda"))
there = DEVICE.type == "cpu" or torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not there, reason="needs a CUDA device")]
cuda_alone = pytest.mark.skipif(DEVICE.type != "cuda", reason="of CUDA's allocator and streams")


def draw(device, dtype="fp32", sampler="dpmpp_2m", **more):
    settings = {"num_inference_steps": 4, "seed": 7, "guidance_scale": 4.0, "sampler": sampler, **more}
    images = Pipeline("a cat on a blue background", device=str(device), dtype=dtype).generate(**settings)
    return np.stack([np.asarray(image, np.int16) for image in images])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_default_model_draws_what_a_cpu_draws(sampler):
    try:
        expected = draw("cpu", sampler=sampler)
    except ConfigError as error:
        pytest.skip(str(error))
    assert np.abs(draw(DEVICE, sampler=sampler) - expected).max() <= 2


def test_how_far_bf16_is_from_fp32(record_property):
    apart = np.abs(draw(DEVICE, "bf16", num_images=4) - draw("cpu", num_images=4))
    record_property("bf16: mean, highest difference", f"{apart.mean():.3f}, {apart.max()}")
    print(f"bf16 against fp32: mean {apart.mean():.3f}, highest {apart.max()} of 255")
    assert apart.mean() < 8


def test_an_image_alone_and_among_eight():
    together = draw(DEVICE, num_images=8, batch_size=8)
    assert np.abs(draw(DEVICE, num_images=8, batch_size=1) - together).max() <= 2


@cuda_alone
def test_memory_that_runs_out_halves_the_batch(capsys):
    torch.cuda.empty_cache()
    expected = draw(DEVICE, num_images=64, batch_size=8)
    free, total = torch.cuda.mem_get_info(DEVICE)
    held = total - free
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + 160e6) / total))
        torch.cuda.empty_cache()
        found = draw(DEVICE, num_images=64, batch_size=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"{held / 1e9:.2f} GB were taken")
    assert "going on with" in capsys.readouterr().err
    assert np.abs(found - expected).max() <= 2


def test_an_autoencoder_in_fp16_is_decoded_in_fp32():
    torch.manual_seed(0)
    vae: VAE = tiny_vae()
    latents = torch.randn(5, 4, 4, 4)
    with torch.no_grad():
        expected = decode(vae, latents)
        with Placement(DEVICE, False, "auto").on(vae.to(DEVICE, torch.float16)) as lent:
            found = decode(lent if DEVICE.type == "cuda" else lent.to(torch.float32), latents.to(DEVICE))
    assert (found - expected).abs().max() < 0.02


@cuda_alone
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_no_evaluation_waits(sampler):
    """CUDA itself says so: see also tests/diffusion/test_waits.py."""
    unet, schedule = build_tiny_model().unet.to(DEVICE), Schedule("v_prediction")
    cond, uncond = (Conditioning(torch.randn(2, 7, 32, device=DEVICE)) for _ in range(2))
    sigmas = schedule.sigmas(4, sampler)
    denoise = guided_denoiser(unet, cond, uncond, Guidance(scale=4.0), schedule, sigmas)
    noise = Noise([1, 2], (4, 4, 4), DEVICE)
    start = noise()
    torch.cuda.synchronize()
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            x0 = sample(denoise, schedule, sigmas, start, sampler, noise=noise)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x0.isfinite().all()


@pytest.mark.parametrize("devices", [("cpu", str(DEVICE)), (str(DEVICE), "cpu")])
def test_a_run_goes_on_elsewhere(devices, tmp_path):
    """To a tolerance: bits are promised on CPUs alone."""
    train_toy(tmp_path / "whole")
    train_toy(tmp_path / "run", device=devices[0], steps=6, decay_from=1)
    train_toy(tmp_path / "run", "latest", device=devices[1], allow_changed=["device"])
    from tests.training.finetune_cases import apart, last_tensors

    for part in ("model.", "ema.", "optimizer."):
        assert apart(last_tensors(tmp_path / "run", part), last_tensors(tmp_path / "whole", part)) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [40, 36, 64], ids=lambda size: f"head {size}")
def test_attention_with_a_mask(backend, dtype, size):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 33, 3 * size), torch.randn(2, 21, 3 * size), torch.randn(2, 21, 3 * size)
    mask = torch.rand(2, 21) > 0.3
    expected = attention(q, k, v, 3, mask, "sdpa")
    try:
        found = attention(*(t.to(DEVICE, dtype) for t in (q, k, v)), 3, mask.to(DEVICE), backend)
    except ModelError as error:  # xformers is absent, or has no kernel for this card: "auto" is sdpa
        pytest.skip(str(error))
    assert (found.float().cpu() - expected).abs().max() < {torch.float32: 1e-5}.get(dtype, 2e-2)
