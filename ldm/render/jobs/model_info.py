"""A model as far as it can be told without its weights: what a prompt file's settings are completed from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ldm.checkpoint import folder as layouts
from ldm.checkpoint import single
from ldm.checkpoint.model import Model, is_single, settings_of
from ldm.checkpoint.model import resolve as place_of
from ldm.console import progress
from ldm.errors import ModelError
from ldm.files import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ldm.nn.unet_config import UNetConfig

LARGE = 1 << 30  # bytes from which on hashing shows a bar


def outline(model: str, vae: str | None = None, prediction_type: str | None = None) -> Model:
    """`model` without text encoder; its U-Net knows its config and levels, its VAE its channels and factor alone.

    The hash is that of the loaded model, from its manifest where there is one (loading compares it with the files), but
    for `vae`, which is left out of it. Raises ModelError as loading does, as far as no weight is needed to tell.
    """
    import dataclasses

    from ldm.diffusion.schedule import Schedule
    from ldm.nn.unet_config import UNetConfig

    place = place_of(model)
    asked = single.check_prediction_type(prediction_type)
    read = _of_file if is_single(place) else _of_folder
    name, configs, info, digest = read(place, model, asked, ("vae",) if vae is not None else ())
    schedule = Schedule.from_diffusers(dict(configs["scheduler"]))
    if asked is not None:
        schedule = dataclasses.replace(schedule, prediction_type=asked)
    config = (settings_of(place_of(vae)).get("vae") if vae is not None else None) or configs.get("vae", {})
    unet = _Unet(UNetConfig.from_diffusers(configs["unet"], place))
    return Model(unet, _vae(config), None, schedule, name, place.resolve(), digest, info)


@dataclass(frozen=True)
class _Unet:
    config: UNetConfig

    def check_levels(self, names: tuple[str, ...]) -> None:
        """As the U-Net's own; which levels have self-attention is known once it is built."""
        if names:
            import torch

            from ldm.nn.unet import UNet

            with torch.device("meta"):
                UNet(self.config).check_levels(names)


def _vae(config: Mapping[str, Any]) -> Any:
    levels = config.get("block_out_channels", (0,))
    return SimpleNamespace(latent_channels=config.get("latent_channels", 4), factor=2 ** (len(levels) - 1))


def _of_folder(place: Path, name: str, _asked: str | None, skip: tuple[str, ...]) -> tuple[str, Mapping, dict, str]:
    """(short name, component -> settings, the card's settings, hash)"""
    layout = layouts.read_layout(place, skip)
    weights = [path for part in layout.weights for path in layout.shards(part)]
    names = [*layout.settings(), *(path.relative_to(place).as_posix() for path in weights)]
    unlisted = [place / name for name in names if name not in layout.manifest]
    total = sum(path.stat().st_size for path in unlisted)
    with progress(total=total, desc=f"hashing {name}", unit="B", disable=total < LARGE) as bar:
        hashed = {path.relative_to(place).as_posix(): sha256(path, bar.update) for path in unlisted}
    digests = {name: hashed.get(name) or layout.manifest[name]["sha256"] for name in names}
    info = layouts.card_settings(layouts.read_card(place) or "")
    return name if name == "default" else place.resolve().name, layout.configs, info, layouts.digest_of(digests)


def _of_file(place: Path, _name: str, asked: str | None, skip: tuple[str, ...]) -> tuple[str, Mapping, dict, str]:
    plan = single.plan_of(place, asked, skip)
    size = place.stat().st_size
    with progress(total=size, desc=f"hashing {place.name}", unit="B", disable=size < LARGE) as bar:
        digest = sha256(place, bar.update)
    return place.stem, plan.configs, layouts.card_settings(plan.card or ""), digest


def hash_of(path: str | Path) -> str:
    """sha256 of a file, or of every file of a folder (an autoencoder's). Raises ModelError where it cannot be read."""
    path = Path(path).expanduser()
    try:
        if not path.is_dir():
            return sha256(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return layouts.digest_of({file.relative_to(path).as_posix(): sha256(file) for file in files})
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror or error})", where=path) from None
