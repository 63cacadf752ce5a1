"""Read a single file as a Model: plan from its header, check on the meta device, then read each byte once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.build import check_fit, clip_text, t5_text
from ldm.checkpoint.families import SCHEDULE_BUFFERS, family_of
from ldm.checkpoint.folder import card_settings
from ldm.checkpoint.safety import Header, read_header, read_tensors
from ldm.checkpoint.single import leftovers
from ldm.checkpoint.single.header import V_KEY, ZERO_SNR_KEY, find_prediction_type, stored_settings, zero_snr
from ldm.checkpoint.single.names import UNET, VAE, Destination, Part, destination_of, parts_of, vae_part
from ldm.checkpoint.single.tokenizers import clips, unpack
from ldm.checkpoint.types import Model
from ldm.console import progress, say
from ldm.errors import LdmError, ModelError

if TYPE_CHECKING:
    import torch

    from ldm.nn.text import TextEncoder
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE as Autoencoder

FLAGS = (V_KEY, ZERO_SNR_KEY)
SHOWN = 5  # names of keys that a message lists


@dataclass(frozen=True)
class Plan:
    """What a single file's header says: the model's settings, and where each tensor goes."""

    path: Path
    header: Header
    family: str | None  # None: sizes of no known family
    configs: Mapping[str, Mapping[str, Any]]  # component -> config.json, `scheduler` included
    tokenizers: Mapping[str, Mapping[str, Any]]  # text encoder -> as in single/write.py
    destinations: Mapping[str, Destination]  # by key in the file
    ignored: Mapping[str, int]  # group of known tensors that are not needed -> how many
    zero_empty: bool = True  # XL: None as a prompt is zeros
    card: str | None = None  # the model card
    leftovers: tuple[str, ...] = ()  # keys that belong to no part and change nothing
    unknown: tuple[str, ...] = ()  # keys that loading refuses; only where `plan_of` is not strict

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Name in the folder -> shape, of one component."""
        shapes = {}
        for key, destination in self.destinations.items():
            if destination.part == part:
                shape = self.header.tensors[key].shape
                shapes |= dict.fromkeys(destination.names, _shape_in_folder(shape, destination, key, self.path))
        return shapes


def plan_of(path: Path, override: str | None = None, skip: tuple[str, ...] = (), strict: bool = True) -> Plan:
    """Understand a file from its header alone: a few milliseconds, no torch.

    `override` is the prediction type that the user gives; parts in `skip` may be missing. Raises ModelError: a pickle,
    a malformed header, no known family, no prediction type; if `strict`, keys that belong to no part, missing parts.
    """
    header = read_header(path)
    settings = stored_settings(header, path)
    if settings is None:
        family = family_of({name: tensor.shape for name, tensor in header.tensors.items()}, path)
        if not any(name.startswith(UNET) for name in header.tensors):
            what = f"holds the U-Net of {family.title} alone, by diffusers' names"
            raise ModelError(what, where=path, hint="give the model's folder")
        configs = family.configs(find_prediction_type(header, family, path, override), zero_snr(header))
        tokenizers: Mapping = {part: {"pad_token": pad} for part, pad in family.pads.items()}
        return _with_destinations(Plan(path, header, family.name, configs, tokenizers, {}, {}), skip, strict)
    family, configs, tokenizers = settings.get("family"), settings["configs"], settings["tokenizers"]
    zero_empty, card = settings.get("zero_empty", True), settings.get("card")
    return _with_destinations(Plan(path, header, family, configs, tokenizers, {}, {}, zero_empty, card), skip, strict)


def _with_destinations(plan: Plan, skip: tuple[str, ...], strict: bool) -> Plan:
    """The same plan with a destination for every tensor. If `strict`, raises ModelError as `plan_of` does."""
    with named(plan.path):
        parts = parts_of(plan.configs)
    destinations, ignored, unknown = {}, Counter(), []
    for key in (key for key in plan.header.tensors if key not in FLAGS):
        part = next((part for part in parts.values() if part.inner(key) is not None), None)
        group = _group(key, part)
        destination = destination_of(part, key) if part is not None and group is None else None
        if destination is not None and destination.part in skip:
            group = f"{destination.part} (another one is used)"
        if group is not None:
            ignored[group] += 1
        elif destination is not None:
            destinations[key] = destination
        else:
            unknown.append(key)
    if unknown:
        plan = _with_leftovers(plan, unknown, strict)
        ignored |= leftovers.groups(plan.leftovers)
    if not strict:
        return replace(plan, destinations=destinations, ignored=dict(ignored))
    missing = [name for name in parts if name not in skip and not any(p.part == name for p in destinations.values())]
    if missing:
        hint = "give one with --vae" if missing == ["vae"] else "get the whole model"
        raise ModelError(f"holds no {' and no '.join(missing)}", where=plan.path, hint=hint)
    return replace(plan, destinations=destinations, ignored=dict(ignored))


def _with_leftovers(plan: Plan, unknown: Sequence[str], strict: bool) -> Plan:
    """The same plan with the keys that have no place. If `strict`, raises ModelError for those that loading needs."""
    if strict:
        leftovers.check_leftovers(unknown, plan.path)
    refused = leftovers.refused(unknown)
    return replace(plan, leftovers=tuple(key for key in unknown if key not in refused), unknown=tuple(refused))


def _group(key: str, part: Part | None) -> str | None:
    """The group of a known tensor that is not needed; None for all others."""
    if key.startswith("model_ema."):
        return "model_ema.*"
    if key in SCHEDULE_BUFFERS:
        return "buffers of the schedule"
    inner = part.inner(key) if part else None
    unused = part.unused if inner is not None else ()
    return next((f"{part.prefixes[0]}{start}*" for start in unused if inner.startswith(start)), None)


def _shape_in_folder(shape: tuple[int, ...], destination: Destination, key: str, path: Path) -> tuple[int, ...]:
    if len(destination.names) > 1:
        if not shape or shape[0] % len(destination.names):
            raise ModelError(f"{key!r} of shape {list(shape)} does not hold q, k and v", where=path)
        return (shape[0] // len(destination.names), *shape[1:])
    if destination.change == "transposed":
        return shape[::-1]
    return shape[:2] if destination.change == "flat" and set(shape[2:]) <= {1} else shape


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors inside the block name the file."""
    try:
        yield
    except LdmError as error:
        if error.where == path:
            raise
        inside = f"{error.where}: " if error.where is not None and not Path(str(error.where)).is_absolute() else ""
        raise ModelError(inside + error.what, where=path, hint=error.hint) from None


def read_single(path: Path, device: torch.device, dtype: torch.dtype, plan: Plan) -> Model:
    """The model of a file with this plan; `vae` is None where the plan skips it, `hash` is the file's sha256.

    Raises ModelError for shapes that do not fit, before any tensor is read, and for weights that are not finite.
    """
    from ldm.diffusion.diffusers_config import read_scheduler

    with named(path):
        schedule = read_scheduler(dict(plan.configs["scheduler"]))
    unet, _, text = _build(plan, _on_meta(plan))
    channels = plan.configs["vae"].get("latent_channels", 4)
    pooled = plan.configs.get("text_encoder_2", {}).get("projection_dim")
    check_fit(unet.config, channels, text.width, path, pooled)
    if plan.leftovers:
        say(f"{path.name}: {leftovers.told(plan.leftovers)}")
    size = path.stat().st_size
    with progress(total=size, desc=f"loading {path.name}", unit="B", disable=size < 1 << 30) as bar:
        states, digest = _read(plan, device, dtype, bar.update)
    unet, vae, text = _build(plan, states)
    for module in (unet, *(() if vae is None else (vae.module,)), *text.modules):
        module.requires_grad_(False)
    info = {**card_settings(plan.card or ""), "family": plan.family}
    info.pop("commit", None)  # models from the hub alone have one, and a card proves nothing
    info |= {"ignored_keys": dict(plan.ignored)} if plan.ignored else {}
    return Model(unet, vae, text, schedule, path.stem, path.resolve(), digest, info)


def text_on_meta(plan: Plan) -> TextEncoder:
    """The text encoder without its weights, which can tokenize."""
    return _build(plan, _on_meta(plan))[2]


def _on_meta(plan: Plan) -> dict[str, dict[str, torch.Tensor]]:
    """The file's tensors without memory, to check whether they fit."""
    import torch

    names = {destination.part for destination in plan.destinations.values()}
    return {
        part: {name: torch.empty(shape, device="meta") for name, shape in plan.shapes(part).items()} for part in names
    }


def _build(plan: Plan, states: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[UNet, Autoencoder, TextEncoder]:
    """The networks that hold the tensors of `states` (part -> name -> tensor). Raises ModelError."""
    from ldm.nn.unet import UNetConfig, load_unet
    from ldm.nn.vae import VAE as Autoencoder

    with named(plan.path), TemporaryDirectory() as files:
        unet = load_unet(UNetConfig.from_diffusers(plan.configs["unet"]), states["unet"], "the U-Net")
        vae = Autoencoder.from_state(plan.configs["vae"], states["vae"], "the VAE") if "vae" in states else None
        return unet, vae, _text(plan, states, Path(files))


def _text(plan: Plan, states: Mapping[str, Mapping[str, torch.Tensor]], files: Path) -> TextEncoder:
    from ldm.nn.text import XLText

    texts = []
    for part in sorted(plan.tokenizers):
        config, state, stored = plan.configs[part], states[part], plan.tokenizers[part]
        if config.get("model_type") == "t5":
            return t5_text(config, state, unpack(stored, files / part), part)
        texts.append(clip_text(config, state, clips(stored, files / part), part, stored.get("words")))
    return texts[0] if len(texts) == 1 else XLText(*texts, plan.zero_empty)


def _read(
    plan: Plan, device: torch.device, dtype: torch.dtype, advance: Callable[[int], object]
) -> tuple[dict[str, dict[str, torch.Tensor]], str]:
    """(part -> name in the folder -> tensor, the file's sha256); every byte is read once."""
    tensors, digest = read_tensors(plan.path, dtype, device, advance, names=plan.destinations)
    states: dict[str, dict[str, torch.Tensor]] = {destination.part: {} for destination in plan.destinations.values()}
    for key, destination in plan.destinations.items():
        states[destination.part] |= dict(zip(destination.names, pieces(tensors.pop(key), destination)))
    return states, digest


def pieces(tensor: torch.Tensor, destination: Destination) -> list[torch.Tensor]:
    """The tensor in the folder's form: cut into q, k and v (each with memory of its own), transposed, or flat."""
    if len(destination.names) > 1:
        return [piece.clone() for piece in tensor.chunk(len(destination.names))]
    if destination.change == "transposed":
        return [tensor.t().contiguous()]
    return [tensor.flatten(1) if destination.change == "flat" else tensor]


def read_vae(
    path: Path, device: torch.device, dtype: torch.dtype, like: Mapping[str, Any] | None
) -> tuple[Autoencoder, str]:
    """(the autoencoder in a file, the file's sha256). The file holds a whole model or an autoencoder alone.

    An autoencoder alone may have its original names or diffusers'. They do not tell the scale of its latents, so it
    gets the settings `like`: those of the model that it is for. Raises ModelError.
    """
    from ldm.nn.vae import VAE as Autoencoder

    header = read_header(path)
    prefix = vae_prefix(header, path)
    settings = stored_settings(header, path)
    if settings is not None:
        config = settings["configs"]["vae"]
    elif any(key.startswith(UNET) for key in header.tensors):
        config = family_of({name: tensor.shape for name, tensor in header.tensors.items()}, path).vae
    elif like is not None:
        config = like
    else:
        raise ModelError("is an autoencoder without settings", where=path, hint="give its folder, with config.json")
    diffusers_names = any(key.startswith(f"{prefix}decoder.up_blocks.") for key in header.tensors)
    part = Part("vae", (prefix,), {}) if diffusers_names else vae_part(config, prefix)
    inside = {
        key: destination_of(part, key) for key in header.tensors if key.startswith(prefix) and not _group(key, part)
    }
    if unknown := [key for key, destination in inside.items() if destination is None]:
        _check_vae_keys(unknown, prefix, path)
        inside = {key: destination for key, destination in inside.items() if destination is not None}
    tensors, digest = read_tensors(path, dtype, device, names=inside)
    state = {destination.names[0]: pieces(tensors.pop(key), destination)[0] for key, destination in inside.items()}
    with named(path):
        vae = Autoencoder.from_state(config, state, "the VAE")
    vae.module.requires_grad_(False)
    return vae, digest


def _check_vae_keys(unknown: Sequence[str], prefix: str, path: Path) -> None:
    """Tell of an autoencoder's tensors that nothing uses. Raises ModelError for those inside the network."""
    leftovers.check_quantised(unknown, path)
    if inside := leftovers.refused([VAE + key.removeprefix(prefix) for key in unknown]):
        raise ModelError(f"has {len(inside)} keys that no autoencoder has ({', '.join(unknown[:SHOWN])})", where=path)
    say(f"{path.name}: {leftovers.told(unknown)}")


def vae_facts(path: Path) -> dict[str, Any]:
    """What the tensors of an autoencoder's file say of its settings: latent channels, and how many levels it has."""
    header = read_header(path)
    prefix = vae_prefix(header, path)
    level = re.compile(rf"{re.escape(prefix)}decoder\.up(?:_blocks)?\.(\d+)\.")
    levels = {match[1] for key in header.tensors if (match := level.match(key))}
    first = header.tensors.get(f"{prefix}decoder.conv_in.weight")
    if first is None or len(first.shape) != 4 or not levels:
        raise ModelError("holds no whole autoencoder", where=path)
    return {"latent_channels": first.shape[1], "block_out_channels": (0,) * len(levels)}


def vae_prefix(header: Header, path: Path) -> str:
    """The prefix of the autoencoder's names in a file. Raises ModelError where there is no autoencoder."""
    for prefix in (VAE, "vae.", ""):
        if any(key.startswith(f"{prefix}decoder.") for key in header.tensors):
            return prefix
    raise ModelError("holds no autoencoder", where=path)
