"""What is known of a model without its weights is what the loaded model says."""

import shutil

import pytest

from ldm.checkpoint import load_model, save_model
from ldm.checkpoint.describe import describe


@pytest.fixture
def forms(tiny_folder, tmp_path):
    """The tiny model as a folder, as one without manifest, and as a single file."""
    bare, single = tmp_path / "bare", tmp_path / "single.safetensors"
    shutil.copytree(tiny_folder, bare)
    (bare / "manifest.json").unlink()
    save_model(load_model(tiny_folder, "cpu", "fp32"), single, dtype="fp32")
    return [tiny_folder, bare, single]


def test_a_description_says_what_the_loaded_model_says(forms, monkeypatch):
    loaded = [load_model(place, "cpu", "fp32", cache=False) for place in forms]
    for module in ("build", "single.read", "safety"):
        monkeypatch.setattr(f"ldm.checkpoint.{module}.read_tensors", None)  # no weight is read
    for place, model in zip(forms, loaded):
        found = describe(str(place), hashed=True)
        assert found == describe(model)
        assert (found.name, found.hash, found.path) == (model.name, model.hash, model.path)
        assert found.schedule == model.schedule and found.unet == model.unet.config
        assert found.factor == model.vae.factor and found.latent_channels == model.vae.latent_channels
        assert found.card == model.info.get("ldm", {})
        assert found.unet.attention_levels == model.unet.attention_levels
    assert describe(forms[0], hashed=True).hash == describe(forms[1], hashed=True).hash  # the manifest says the truth
