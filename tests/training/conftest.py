"""A complete small training set-up: an autoencoder and a text tower on disk, and settings that train in a second."""

import contextlib
import json

import pytest

SCHEDULE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "spacing": "trailing"}
TINY_UNET = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "transformer_layers": [0, 1],
    "num_heads": [2, 4],
    "norm_num_groups": 8,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
}


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """A folder with a tiny VAE and a tiny text encoder, as the first two stages leave them."""
    import torch

    from ldm.checkpoint.parts import save_parts
    from tests.conftest import tiny_text, tiny_vae

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save_parts(tmp_path_factory.mktemp("parts") / "model", torch.float32, vae=tiny_vae(), text=tiny_text())


@contextlib.contextmanager
def threads(count):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Children that are forked may not meet OpenMP's threads."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def unet_mapping(parts):
    """Settings of the U-Net stage with everything on that resuming could get wrong."""
    return {
        "stage": "unet",
        "steps": 12,
        "batch_size": 4,
        "accumulation": 2,
        "learning_rate": 1e-3,
        "optimizer": "muon",
        "timestep_shift": 2.0,
        "sampler": "dpmpp_sde",
        "warmup": 5,
        "ema": 0.9,
        "workers": 2,
        "precision": "fp32",
        "device": "cpu",
        "save_every": 3,
        "validate_every": 12,
        "log_every": 2,
        "caption_dropout": 0.3,
        "latent_pool": 512,
        "renew": 2,
        "validation": 8,
        "sample_steps": 2,
        "vae": str(parts),
        "text": str(parts),
        "data": {"resolution": 32, "scenes": {"objects": "everyday"}},
        "schedule": SCHEDULE,
        "model": TINY_UNET,
    }


@pytest.fixture
def unet_settings(tmp_path, unet_mapping):
    """The path of a settings file."""
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(unet_mapping))
    return path
