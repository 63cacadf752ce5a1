"""Single parts of a model for training, in diffusers' folders (`vae/`, `text_encoder/`, `tokenizer/`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoint import build
from ldm.checkpoint import folder as layouts
from ldm.checkpoint import model as models
from ldm.checkpoint.save import write_text, write_vae
from ldm.errors import ModelError
from ldm.files import atomic_folder, write_manifest

if TYPE_CHECKING:
    import torch

    from ldm.nn.text import TextEncoder
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE

SHARD = 15_000_000  # bytes


def save_parts(folder: Path, dtype: torch.dtype, vae: VAE | None = None, text: TextEncoder | None = None) -> Path:
    """Write these parts and a manifest, atomically; the folder's former content is replaced."""
    with atomic_folder(folder) as new:
        if vae is not None:
            write_vae(vae, new, dtype, SHARD)
        if text is not None:
            write_text(text, new, dtype, SHARD)
        write_manifest(new)
    return folder


def load_vae_from(folder: Path) -> VAE:
    """The autoencoder of a run, a model's folder or an autoencoder's folder, fp32 on the CPU. Raises ModelError."""
    import torch

    inner = folder / "vae" if (folder / "vae").is_dir() else folder
    return models.load_vae(inner, torch.device("cpu"), torch.float32)[0]


def load_text_from(folder: Path) -> TextEncoder:
    """The text encoder and tokenizer of a run or model folder, fp32 on the CPU. Raises ModelError."""
    import torch

    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        raise ModelError("holds no text encoder with its tokenizer", where=folder, hint="give a run of the text stage")
    layout = layouts.text_layout(folder)
    layouts.check_settings(layout)
    state = build.read_part(layout, "text_encoder", torch.float32, torch.device("cpu"), {})
    return build.build_text(layout, {"text_encoder": state})


def load_unet_from(folder: Path) -> UNet:
    """The U-Net of a whole model's folder, fp32 on the CPU. Raises ModelError."""
    import torch

    from ldm.nn.unet import load_unet

    layout = layouts.read_layout(folder)
    state = build.read_part(layout, "unet", torch.float32, torch.device("cpu"), {})
    return load_unet(build.unet_config(layout), state, folder / "unet")
