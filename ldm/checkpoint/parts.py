"""Single parts of a model for training: found, described by their settings, loaded and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint import build, single
from ldm.checkpoint import folder as layouts
from ldm.checkpoint import model as models
from ldm.checkpoint.families import VAE as VAE_CONFIG
from ldm.checkpoint.families import family_of
from ldm.checkpoint.part_places import Place, find_place, model_folder, weights_of
from ldm.checkpoint.safety import read_header, read_json, write_manifest
from ldm.checkpoint.save import write_text, write_vae
from ldm.checkpoint.single.names import UNET
from ldm.checkpoint.single.read import vae_prefix
from ldm.checkpoint.text_parts import TextParts, find_text
from ldm.console import say
from ldm.errors import ModelError
from ldm.files import atomic_folder

if TYPE_CHECKING:
    import torch

    from ldm.nn.text import TextEncoder
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE

__all__ = ["Place", "TextParts", "VaePart", "find_text", "find_vae", "load_text_from", "load_unet_from"]
__all__ += ["load_vae_from", "model_folder", "save_parts"]
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


@dataclass(frozen=True)
class VaePart:
    """An autoencoder on disk, known by its settings."""

    place: Place
    config: Mapping[str, Any]
    scale: float | None = None  # that the user gave, of a file that does not tell it

    @property
    def latent_channels(self) -> int:
        return self.config.get("latent_channels", 4)

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.config.get("block_out_channels", (0,))) - 1)

    @property
    def files(self) -> list[Path]:
        """Every file that loading reads."""
        folders = self.place.folders
        return [*weights_of(folders[0]), folders[0] / "config.json"] if folders else [self.place.root]

    @property
    def fingerprint(self) -> str:
        """One digest of its files."""
        digest = self.place.fingerprint(self.files)
        return digest if self.scale is None else f"{digest} scaled by {self.scale:g}"

    def load(self) -> VAE:
        """The autoencoder in fp32 on the CPU. Raises ModelError."""
        import torch

        path = self.place.folders[0] if self.place.folders else self.place.root
        return models.load_vae(path, torch.device("cpu"), torch.float32, self.config)[0]


def find_vae(name: str, subfolder: str | None = None, weights: bool = True, scale: float | None = None) -> VaePart:
    """The autoencoder of a name (see `find_place`), checked by its settings alone. Raises ModelError.

    A single file with an autoencoder alone has no settings: its tensors tell its sizes, and `scale` is the factor that
    gives its latents unit variance. With the sizes of Stable Diffusion 1.x's it has that one's unless another is given.
    """
    part = _find_vae(name, subfolder, weights, scale)
    told = part.config.get("scaling_factor", VAE_CONFIG["scaling_factor"])  # diffusers' default
    if scale is not None and scale != told:
        what = f"is {scale:g}, and the settings of {part.place.name} say {told}"
        raise ModelError(what, where="vae_scaling_factor", hint="leave it out")
    return part


def _find_vae(name: str, subfolder: str | None, weights: bool, scale: float | None) -> VaePart:
    place = find_place(name, "vae", subfolder, weights)
    if place.folders:
        config = read_json(place.folders[0] / "config.json")
        named = config.get("_class_name") or (config.get("architectures") or ["AutoencoderKL"])[0]
        if named != "AutoencoderKL":
            where = place.folders[0] / "config.json"
            raise ModelError(f"is of class {named}, and an autoencoder is AutoencoderKL", where=where)
        return VaePart(place, config)
    header = read_header(place.root)
    prefix = vae_prefix(header, place.root)
    if settings := single.stored_settings(header, place.root):
        return VaePart(place, settings["configs"]["vae"])
    shapes = {key: tensor.shape for key, tensor in header.tensors.items()}
    if any(key.startswith(UNET) for key in shapes):
        return VaePart(place, family_of(shapes, place.root).vae)
    config = single.vae_sizes(
        {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}, place.root
    )
    if scale is not None:
        return VaePart(place, {**config, "scaling_factor": scale}, scale)
    if any(config[name] != VAE_CONFIG[name] for name in ("block_out_channels", "latent_channels")):
        channels = f"{config['latent_channels']} latent channels, widths {config['block_out_channels']}"
        what = f"is an autoencoder without settings, of another size than Stable Diffusion 1.x's ({channels})"
        hint = "give its folder, with config.json, or what its latents are multiplied by: vae_scaling_factor=…"
        raise ModelError(what, where=place.root, hint=hint)
    scale = VAE_CONFIG["scaling_factor"]
    say(f"{place.root}: an autoencoder without settings is read as Stable Diffusion 1.x's (scaling_factor {scale})")
    return VaePart(place, {**config, "scaling_factor": scale})


def load_vae_from(folder: Path) -> VAE:
    """The autoencoder of a run, a model's folder or an autoencoder's folder, fp32 on the CPU. Raises ModelError."""
    return find_vae(str(folder)).load()


def load_text_from(folder: Path) -> TextEncoder:
    """The text encoder and tokenizer of a run or model folder, fp32 on the CPU. Raises ModelError."""
    return find_text(str(folder)).load()


def load_unet_from(folder: Path) -> UNet:
    """The U-Net of a whole model's folder, fp32 on the CPU. Raises ModelError."""
    import torch

    from ldm.nn.unet import load_unet

    layout = layouts.read_layout(folder)
    if layout.network != "unet":
        raise ModelError("has a flow transformer and no U-Net", where=folder)
    state = build.read_part(layout, "unet", torch.float32, torch.device("cpu"), {})
    return load_unet(build.network_config(layout), state, folder / "unet")
