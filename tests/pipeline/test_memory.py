"""Memory that runs out: in loading, in a batch, in decoding; on a CPU, with networks that say that there is none."""

import numpy as np
import pytest
import torch
from diffusers.models import AutoencoderKL

from ldm.checkpoint import clear_cache, load_model
from ldm.checkpoint import model as models
from ldm.cli import main
from ldm.device import without_tf32
from ldm.errors import NumericsError, ResourceError
from ldm.nn.offload import at_work
from ldm.nn.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.engine import decode
from ldm.pipeline.placement import Placement
from tests.conftest import tiny_vae

FAST = {"num_inference_steps": 2, "sampler": "euler", "seed": 7}
META = torch.device("meta")


@pytest.fixture
def small_gpu(monkeypatch):
    """A U-Net that has room for so many rows; returns the rows of its calls."""
    calls, forward = [], UNet.forward

    def limited(most):
        def call(self, x, *args, **kwargs):
            calls.append(len(x))
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return forward(self, x, *args, **kwargs)

        monkeypatch.setattr(UNet, "forward", call)
        return calls

    return limited


def test_a_batch_without_room_is_drawn_in_halves(tiny_folder, small_gpu, capsys):
    pipe = Pipeline("a cat", model=tiny_folder, device="cpu", dtype="fp32")
    expected = pipe.generate(num_images=7, batch_size=7, **FAST)
    calls = small_gpu(4)  # two images of two rows
    found = pipe.generate(num_images=7, batch_size=7, **FAST)
    assert found.seeds == expected.seeds
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(found, expected))
    assert calls == [14, 6, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert capsys.readouterr().err.count("going on with") == 2
    calls.clear()
    pipe.generate(num_images=2, batch_size=7, **FAST)
    assert max(calls) == 2  # it is known now


def test_one_image_without_room_is_an_error_of_one_line(tiny_folder, small_gpu):
    small_gpu(0)
    with pytest.raises(ResourceError, match="out of memory at 1 x 32x32; use a smaller size") as caught:
        Pipeline("a cat", model=tiny_folder, device="cpu").generate(num_images=2, **FAST)
    assert caught.value.row == 0


def test_what_cannot_be_decoded_at_once_is_decoded_in_tiles(monkeypatch, capsys):
    torch.manual_seed(0)
    vae = tiny_vae()
    latents = torch.randn(2, 4, 80, 24)
    with torch.no_grad():
        expected = decode(vae, latents, tile=64)
    forward, most = AutoencoderKL.decode, 64

    def limited(self, z):
        if z.shape[-2] > most:
            raise RuntimeError("CUDA error: out of memory")
        return forward(self, z)

    monkeypatch.setattr(AutoencoderKL, "decode", limited)
    with torch.no_grad():
        assert (decode(vae, latents) == expected).all()
    assert "decoding it in tiles" in capsys.readouterr().err
    most = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(vae, latents)


@pytest.fixture
def full(monkeypatch):
    """Loading that finds no room while so many models are in the cache."""
    load = models._load

    def full(most):
        def call(*args):
            if len(models._cache) > most:
                raise RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)")
            return load(*args)

        monkeypatch.setattr(models, "_load", call)

    clear_cache()
    yield full
    clear_cache()


def test_loading_without_room_drops_the_other_models(tiny_folder, changed_folder, full):
    first = load_model(tiny_folder, "cpu", "fp32")
    full(0)
    other = load_model(changed_folder("vae/config.json", {"scaling_factor": 0.25}), "cpu", "fp32")
    assert other.vae.scaling_factor == 0.25 and list(models._cache.values()) == [other]
    assert load_model(tiny_folder, "cpu", "fp32") is not first


def test_loading_without_any_room_is_an_error_of_one_line(tiny_folder, full, capsys):
    full(-1)
    with pytest.raises(ResourceError, match=r"out of memory in loading .*tiny to cpu; use offload"):
        load_model(tiny_folder, "cpu", "fp32")
    assert main(["generate", "a cat", "--model", str(tiny_folder), "-q"]) == 4
    assert capsys.readouterr().err.startswith("error: model: out of memory in loading")


def test_memory_that_runs_out_anywhere_is_no_bug(tiny_folder, monkeypatch, capsys):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("ldm.pipeline.pipeline.make_metadata", no_memory)
    assert main(["generate", "a cat", "--model", str(tiny_folder), "-q"]) == 4
    assert capsys.readouterr().err == "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)\n"


def test_cached_models_are_counted_by_their_bytes(tiny_folder, changed_folder, full, monkeypatch):
    first = load_model(tiny_folder, "cpu", "fp32")
    monkeypatch.setattr(models, "total_memory", lambda device: 5 * models._held(device))
    load_model(changed_folder("vae/config.json", {"scaling_factor": 0.25}), "cpu", "fp32")
    assert load_model(tiny_folder, "cpu", "fp32") is first and len(models._cache) == 2
    monkeypatch.setattr(models, "total_memory", lambda device: 1.5 * models._held(device))
    last = load_model(changed_folder("vae/config.json", {"scaling_factor": 0.125}), "cpu", "fp32")
    assert list(models._cache.values()) == [last]  # one is kept, whatever it takes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_decodes_in_fp32(dtype):
    vae = tiny_vae().to(META, dtype)
    for offload in (False, True):
        with Placement(META, offload, "auto").on(vae) as lent:
            assert lent.dtype == torch.float32 and vae.dtype == dtype
    with Placement(torch.device("cpu"), False, "auto").on(tiny_vae().to(dtype)) as lent:
        assert lent.dtype == dtype  # bits of CPUs stay


def test_an_autoencoder_that_overflows_in_fp16_decodes_in_fp32():
    torch.manual_seed(0)
    vae = tiny_vae()
    vae.module.post_quant_conv.weight.data *= 1e5
    vae.to(torch.float16)
    latents = 10 * torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        with pytest.raises(NumericsError):
            vae.decode(latents)
        with at_work(vae, torch.device("cpu"), torch.float32) as lent:
            assert lent.decode(latents).isfinite().all()


def test_tf32_is_off_for_a_call_alone():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError), without_tf32():
        assert torch.backends.cudnn.allow_tf32 is False
        raise ValueError
    assert torch.backends.cudnn.allow_tf32 is before
