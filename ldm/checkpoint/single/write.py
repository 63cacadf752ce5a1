"""Write a Model as one file with Stable Diffusion's original names, which A1111, ComfyUI and diffusers read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.build import check_fit
from ldm.checkpoint.families import family_of
from ldm.checkpoint.safety import Advance, read_header, silent
from ldm.checkpoint.save import encoders, text_config, text_state, vae_config
from ldm.checkpoint.single.header import FORMAT, V_KEY, ZERO_SNR_KEY, metadata_of
from ldm.checkpoint.single.names import UNET, Destination, Part, originals, parts_of
from ldm.checkpoint.single.tokenizers import stored
from ldm.checkpoint.tensors import Source, source, write_tensors
from ldm.checkpoint.types import Model
from ldm.errors import LdmError, ModelError
from ldm.files import atomic_write, require_space
from ldm.nn.mmdit_config import MMDiTConfig

if TYPE_CHECKING:
    import torch


SUFFIX = ".safetensors"


def save_single(
    model: Model, path: str | Path, dtype: torch.dtype, card: str | None = None, advance: Advance = silent
) -> Path:
    """Write the whole model into one file, atomically; only another single-file model is replaced.

    Weights become `dtype`; `card`, the model card, goes into the header with all settings. `advance` is called with
    the number of bytes written. Raises ModelError for weights that are not finite in `dtype` and parts that do not
    belong together, ResourceError where the file cannot be written.
    """
    from ldm.nn.text import ClipText

    path = Path(path)
    check_target(path)
    if isinstance(model.unet.config, MMDiTConfig) and isinstance(model.text, ClipText):
        raise ModelError("a flow transformer with one CLIP has no single-file form", where=path, hint="name a folder")
    check_fit(model.unet.config, model.vae.latent_channels, model.text.width, path)
    settings, states = _settings(model, card), _states(model)
    sources: dict[str, Source] = {}
    for part in parts_of(settings["configs"]).values():
        sources |= _sources(part, states[part.name], dtype, path)
    sources |= _flags(settings["configs"]["scheduler"])
    metadata = metadata_of(settings, model.name or path.stem)
    require_space(path.parent, sum(one.size for one in sources.values()) + 10_000_000)
    return atomic_write(path, lambda temporary: write_tensors(temporary, sources, metadata, advance))


def check_target(path: Path) -> None:
    """Raise ModelError unless `path` can become a single-file model: a new file, or one that holds such a model."""
    if path.suffix != SUFFIX:
        raise ModelError(f"is not the name of a single file: it must end with {SUFFIX}", where=path)
    if path.is_dir():
        raise ModelError("is a folder", where=path, hint="choose another name")
    if not path.exists():
        return
    try:
        replaceable = any(name.startswith(UNET) for name in read_header(path).tensors)
    except LdmError:
        replaceable = False
    if not replaceable:
        raise ModelError("exists and is no model", where=path, hint="choose another name")


def _settings(model: Model, card: str | None) -> dict[str, Any]:
    """The table for the header: every config of the model's folder, tokenizers, family, model card."""
    from ldm.diffusion.diffusers_config import write_scheduler
    from ldm.nn.text import XLText

    configs = {_network(model): model.unet.config.to_diffusers(), "vae": vae_config(model.vae)}
    configs["scheduler"] = write_scheduler(model.schedule)
    tokenizers = {}
    with TemporaryDirectory() as files:
        for suffix, text in encoders(model.text).items():
            part = f"text_encoder{suffix}"
            configs[part], tokenizers[part] = text_config(text), stored(text, Path(files) / part)
    configs["vae"].pop("_diffusers_version")  # the same model, the same bytes
    settings = {"format": FORMAT, "family": _family(model), "configs": configs, "tokenizers": tokenizers}
    if isinstance(model.text, XLText):
        settings["zero_empty"] = model.text.zero_empty
    return settings if card is None else {**settings, "card": card}


def _network(model: Model) -> str:
    return "transformer" if isinstance(model.unet.config, MMDiTConfig) else "unet"


def _family(model: Model) -> str | None:
    if _network(model) == "transformer":
        return None
    try:
        return family_of({name: tuple(tensor.shape) for name, tensor in model.unet.state_dict().items()}).name
    except ModelError:
        return None


def _states(model: Model) -> dict[str, dict[str, torch.Tensor]]:
    states = {_network(model): model.unet.state_dict(), "vae": model.vae.module.state_dict()}
    return states | {f"text_encoder{suffix}": text_state(text) for suffix, text in encoders(model.text).items()}


def _sources(part: Part, state: Mapping[str, torch.Tensor], dtype: torch.dtype, path: Path) -> dict[str, Source]:
    """Key in the file -> the tensor to write there."""

    def one(key: str, destination: Destination) -> Source:
        pieces = [source(state[name], dtype, key, path) for name in destination.names]
        first = pieces[0]
        shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:]) if first.shape else ()
        shape = {"transposed": shape[::-1], "flat": (*shape, 1, 1)}.get(destination.change, shape)
        return Source(first.dtype, shape, lambda: _joined([piece.make() for piece in pieces], shape, destination))

    sources = {}
    for key, destination in originals(part, state):
        if destination is None:
            raise ModelError(f"the tensor {key!r} of {part.name} has no name in a single file", where=path)
        sources[key] = one(key, destination)
    return sources


def _joined(tensors: list[torch.Tensor], shape: tuple[int, ...], destination: Destination) -> torch.Tensor:
    """The folder's tensors in the file's form: q, k and v stacked, transposed, halves swapped, or a 1x1 convolution."""
    import torch

    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    if destination.change == "swapped":
        return whole.roll(len(whole) // 2, 0)
    return whole.t() if destination.change == "transposed" else whole.reshape(shape)


def _flags(scheduler: Mapping[str, Any]) -> dict[str, Source]:
    """Empty tensors that mark a v-prediction model, and one with zero terminal SNR, for other programs."""
    import torch

    v = scheduler.get("prediction_type") == "v_prediction"
    names = [V_KEY] * v + [ZERO_SNR_KEY] * (v and bool(scheduler.get("rescale_betas_zero_snr")))
    return {name: Source(torch.float32, (0,), lambda: torch.zeros(0)) for name in names}
