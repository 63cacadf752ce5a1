"""One network on disk, beside a model: a folder of config.json and weights, as ControlNets and vision towers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.describe import ModelInfo
from ldm.checkpoint.families import FAMILIES
from ldm.checkpoint.folder import digest_of, weight_files
from ldm.checkpoint.hub import fetch, no_weights
from ldm.checkpoint.safety import check_manifest, read_header, read_tensors
from ldm.errors import LdmError, ModelError
from ldm.files import sha256

CONFIG = "config.json"
TITLES = {family.unet["cross_attention_dim"]: family.title for family in FAMILIES.values() if not family.inpainting}


def network_on_hub(name: str, stem: str) -> Path:
    """The folder of a hub's network whose weights are `stem`.safetensors, also in shards or in 16 bits."""
    weights = [f"{stem}.safetensors", f"{stem}[.-]*.safetensors"]  # in shards; not STEM_promax.safetensors beside it
    for half in (False, True):
        folder = fetch(name, [CONFIG, *weights, f"{stem}*.json"], half, first=CONFIG)
        if any(folder.glob(f"{stem}*.safetensors")):
            return folder
    raise no_weights(name, f"{stem}.safetensors")


def tensor_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """The files with a network's tensors. Raises ModelError where there are none."""
    return tuple(file for file in weight_files(folder, stem) if file.suffix == ".safetensors")


def hash_of_network(folder: Path, stem: str) -> str:
    """One sha256 over the settings and weights of a folder."""
    files = [folder / CONFIG, *weight_files(folder, stem)]
    return digest_of({file.name: sha256(file) for file in files})


def check_text_width(width: int, info: ModelInfo, path: Path, hint: str | None = None) -> None:
    """Raise ModelError where a network reads text of another width than the model's U-Net."""
    if width != (wanted := info.unet.text_width):
        kinds = [f"{TITLES[n]} (text of width {n})" if n in TITLES else f"text of width {n}" for n in (width, wanted)]
        raise ModelError(f"is for {kinds[0]}, and the model {info.name} is {kinds[1]}", where=path, hint=hint)


def tensors_on_meta(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of some files as their headers describe them, without values."""
    shapes = {name: tensor.shape for file in files for name, tensor in read_header(file).tensors.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_checked(
    path: Path,
    files: Sequence[Path],
    dtype: torch.dtype,
    device: torch.device,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """The wanted tensors of all files, each read once and compared with the manifest of the folder `path`, if any.

    Raises ModelError for weights that are damaged or not finite in `dtype`.
    """
    manifest, state = check_manifest(path) if path.is_dir() else {}, {}
    for file in files:
        names = [name for name in read_header(file).tensors if wanted(name)]
        tensors, digest = read_tensors(file, dtype, device, names=names)
        if manifest.get(file.name, {}).get("sha256", digest) != digest:
            raise ModelError("is damaged: its sha256 is not that of the manifest", where=file)
        state |= {name: tensors[name] for name in names}
    return state


@contextmanager
def reading_settings(where: Path) -> Iterator[None]:
    """A block that builds something from a file's settings: any failure in it is a ModelError about that file."""
    try:
        yield
    except LdmError as error:
        raise (ModelError(error.what, where=where, hint=error.hint) if error.where is None else error) from None
    except Exception as error:  # whatever a damaged file makes of it
        raise ModelError(f"the settings cannot be used ({type(error).__name__}: {error})"[:200], where=where) from None
