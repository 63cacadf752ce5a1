"""Loading shows a bar from 1 GiB up, as a load of XL is; the files have holes in the place of their weights."""

import math
import time

import pytest
import torch

from ldm.checkpoint import load_model
from ldm.checkpoint.families import FAMILIES
from ldm.checkpoint.single.names import originals, parts_of
from ldm.errors import ModelError
from tests.checkpoint.test_inspect import sparse

NAN = b"\x00\x7e"  # in fp16; the first number of each file, so that reading ends with it


def xl_tensors():
    """Every tensor of XL at full width by its original name: name -> (dtype, shape)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ldm.nn.unet import UNet, UNetConfig
    from ldm.nn.vae import VAE

    configs = FAMILIES["xl"].configs("epsilon")
    with torch.device("meta"):
        modules = {
            "unet": UNet(UNetConfig.from_diffusers(configs["unet"])),
            "vae": VAE.from_config(configs["vae"]).module,
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"]))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(configs["text_encoder_2"]))),
        }
    found = {}
    for name, part in parts_of(configs).items():
        shapes = {n: tuple(t.shape) for n, t in modules[name].state_dict().items()}
        if name.startswith("text"):
            projected = {n: s for n, s in shapes.items() if n.startswith("text_projection")}
            shapes = {f"text_model.{n.removeprefix('text_model.')}": s for n, s in shapes.items() if n not in projected}
            shapes |= projected
        for key, place in originals(part, shapes):
            shape = shapes[place.names[0]]
            found[key] = ("F16", (len(place.names) * shape[0], *shape[1:]))
    return found


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setenv("LDM_PROGRESS", "1")


def test_a_7_gb_load_of_xl_shows_a_bar(shown, tmp_path, capsys):
    tensors = xl_tensors()
    path = sparse(tmp_path / "xl.safetensors", tensors, first=NAN)
    assert 6.5e9 < 2 * sum(math.prod(shape) for _, shape in tensors.values()) < 7.5e9
    start = time.process_time()
    with pytest.raises(ModelError, match=f"'{next(iter(tensors))}' holds NaN"):
        load_model(path, "cpu", "fp16" if torch.cuda.is_available() else "bf16")
    assert time.process_time() - start < 30
    bar = capsys.readouterr().err
    assert "loading xl.safetensors" in bar and "/6.9" in bar  # of 6.9 GB


@pytest.mark.parametrize(("size", "bar"), [((1 << 30) + 8, True), ((1 << 30) - (1 << 24), False)])
def test_a_folder_shows_a_bar_from_1_gib_up(size, bar, copied, shown, capsys):
    (copied / "manifest.json").unlink()
    for path in (copied / "unet").glob("diffusion*"):
        path.unlink()
    tensors = {"a": ("F16", (1,)), "b": ("U8", (size,))}
    sparse(copied / "unet/diffusion_pytorch_model.safetensors", tensors, first=NAN)
    with pytest.raises(ModelError, match="'a' holds NaN"):
        load_model(copied, "cpu", "fp32")
    assert ("loading tiny" in capsys.readouterr().err.replace(str(copied), "tiny")) == bar
