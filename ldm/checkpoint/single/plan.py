"""What a single file is, by its header alone: the model's settings, and where each tensor goes. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.checkpoint.families import SCHEDULE_BUFFERS, family_of
from ldm.checkpoint.safety import Header, read_header
from ldm.checkpoint.single import leftovers
from ldm.checkpoint.single.flow_settings import PADS, flow_configs
from ldm.checkpoint.single.flow_texts import Extra, absent_parts, hint_for, with_texts
from ldm.checkpoint.single.header import V_KEY, ZERO_SNR_KEY, find_prediction_type, stored_settings, zero_snr
from ldm.checkpoint.single.names import UNET, Destination, Part, destination_of, flow_texts, parts_of
from ldm.errors import LdmError, ModelError
from ldm.nn.mmdit_config import FLUX, MMDiTConfig
from ldm.nn.unet_config import UNetConfig

FLAGS = (V_KEY, ZERO_SNR_KEY)


@dataclass(frozen=True)
class Plan:
    """What a single file's header says: the model's settings, and where each tensor goes; and what else it needs."""

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
    extras: tuple[Extra, ...] = ()  # SD3 and FLUX: files of text encoders beside it
    own_projection: bool = True  # False: CLIP-L of an SD3 file, whose pooled text is taken as it is
    absent: tuple[str, ...] = ()  # SD3 and FLUX: what is still to be given; only where `plan_of` is not strict

    @property
    def network(self) -> str:
        """The component that denoises: unet or transformer."""
        return "transformer" if "transformer" in self.configs else "unet"

    @property
    def files(self) -> tuple[Extra, ...]:
        """Every file that is read, the model's own first."""
        return (Extra(self.path, self.header, self.destinations), *self.extras)

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Name in the folder -> shape, of one component."""
        shapes = {}
        for path, header, destinations in self.files:
            for key, destination in destinations.items():
                if destination.part == part:
                    shape = header.tensors[key].shape
                    shapes |= zip(destination.names, _shapes_in_folder(shape, destination, key, path))
        return shapes


def plan_of(
    path: Path,
    override: str | None = None,
    skip: tuple[str, ...] = (),
    strict: bool = True,
    texts: Sequence[Path] = (),
) -> Plan:
    """Understand a file from its header alone: a few milliseconds, no torch.

    `override` is the prediction type that the user gives; parts in `skip` may be missing. `texts` are files and folders
    of text encoders for SD3 or FLUX. Raises ModelError: a pickle, a malformed header, no known family, no prediction
    type; if `strict`, keys that belong to no part, missing parts.
    """
    header = read_header(path)
    settings = stored_settings(header, path)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    flow = flow_configs(shapes, path) if settings is None else None
    if flow is not None:
        pads = {part: {"pad_token": PADS[short]} for part, short in clips_of(flow).items() if part in flow}
        return _with_texts(Plan(path, header, None, flow, pads, {}, {}, own_projection=False), texts, skip, strict)
    if settings is not None and "transformer" in settings["configs"]:
        plan = Plan(path, header, None, settings["configs"], settings["tokenizers"], {}, {}, card=settings.get("card"))
        return _with_texts(plan, texts, skip, strict)
    if texts:
        what = "text encoders can be given for SD3 and FLUX alone"
        raise ModelError(what, where=path, hint="leave --text-encoders out")
    if settings is None:
        family = family_of(shapes, path)
        if not any(name.startswith(UNET) for name in header.tensors):
            what = f"holds the U-Net of {family.title} alone, by diffusers' names"
            raise ModelError(what, where=path, hint="give the model's folder")
        configs = family.configs(find_prediction_type(header, family, path, override), zero_snr(header))
        tokenizers: Mapping = {part: {"pad_token": pad} for part, pad in family.pads.items()}
        return _with_destinations(Plan(path, header, family.name, configs, tokenizers, {}, {}), skip, strict)
    family, configs, tokenizers = settings.get("family"), settings["configs"], settings["tokenizers"]
    zero_empty, card = settings.get("zero_empty", True), settings.get("card")
    return _with_destinations(Plan(path, header, family, configs, tokenizers, {}, {}, zero_empty, card), skip, strict)


def clips_of(configs: Mapping[str, Any]) -> dict[str, str]:
    """CLIP's encoders of SD3 or FLUX -> clip_l, clip_g."""
    names = flow_texts(configs["transformer"]["_class_name"] == FLUX)
    return {part: short for part, short in names.items() if short in PADS}


def _with_texts(plan: Plan, given: Sequence[Path], skip: tuple[str, ...], strict: bool) -> Plan:
    """The plan of SD3 or FLUX, with the text encoders that are given in place of the file's."""
    flux = plan.configs["transformer"]["_class_name"] == FLUX
    texts = with_texts(plan.configs, given, flux)
    pads = {part: {"pad_token": PADS[short]} for part, short in clips_of(plan.configs).items() if part in texts.configs}
    plan = replace(
        plan,
        configs={**plan.configs, **texts.configs},
        tokenizers={**pads, **plan.tokenizers, **texts.tokenizers},
        extras=texts.extras,
        own_projection=plan.own_projection or texts.whole_clip,
    )
    replaced = {destination.part for extra in texts.extras for destination in extra.destinations.values()}
    plan = _with_destinations(plan, (*skip, *replaced), strict, whole=False)
    vae = "vae" in skip or any(destination.part == "vae" for destination in plan.destinations.values())
    missing = absent_parts(plan.configs, plan.tokenizers, flux, vae)
    if missing and strict:
        what = f"holds no {' and no '.join(missing)}"
        raise ModelError(what, where=plan.path, hint=hint_for(missing))
    return replace(plan, absent=tuple(missing))


def _with_destinations(plan: Plan, skip: tuple[str, ...], strict: bool, whole: bool = True) -> Plan:
    """The same plan with a destination for every tensor. If `strict`, raises ModelError as `plan_of` does; not for
    missing parts unless `whole`."""
    with named(plan.path):
        parts = parts_of(plan.configs)
    destinations, ignored, unknown = {}, Counter(), []
    for key in (key for key in plan.header.tensors if key not in FLAGS):
        part = next((part for part in parts.values() if part.inner(key) is not None), None)
        group = group_of(key, part)
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
    if not strict or not whole:
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


def group_of(key: str, part: Part | None) -> str | None:
    """The group of a known tensor that is not needed; None for all others."""
    if key.startswith("model_ema."):
        return "model_ema.*"
    if key in SCHEDULE_BUFFERS:
        return "buffers of the schedule"
    inner = part.inner(key) if part else None
    unused = part.unused if inner is not None else ()
    return next((f"{part.prefixes[0]}{start}*" for start in unused if inner.startswith(start)), None)


def _shapes_in_folder(shape: tuple[int, ...], destination: Destination, key: str, path: Path) -> list[tuple[int, ...]]:
    if len(destination.names) > 1:
        rows = destination.rows(shape[0]) if shape else None
        if rows is None:
            raise ModelError(f"{key!r} of shape {list(shape)} does not hold q, k and v", where=path)
        return [(one, *shape[1:]) for one in rows]
    if destination.change == "transposed":
        return [shape[::-1]]
    return [shape[:2] if destination.change == "flat" and set(shape[2:]) <= {1} else shape]


def pooled_width(plan: Plan) -> int | None:
    """The width of the pooled text: XL's, SD3's of both encoders, FLUX's."""
    texts = [plan.configs[part] for part in sorted(plan.configs) if part.startswith("text_encoder")]
    clips = [config for config in texts if config.get("model_type") != "t5"]
    if plan.network == "transformer":
        name = "projection_dim" if len(clips) > 1 else "hidden_size"
        return sum(config.get(name, 512) for config in clips)
    return clips[1].get("projection_dim") if len(clips) > 1 else None


def fp8_kinds(plan: Plan) -> set[str]:
    """The types of 8 bits that a plan's files have weights in, by torch's names."""
    names = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    kinds = {header.tensors[key].dtype for _, header, destinations in plan.files for key in destinations}
    return {names[kind] for kind in kinds if kind in names}


def network_of(plan: Plan) -> UNetConfig | MMDiTConfig:
    """The settings of the network. Raises ModelError for unsupported ones."""
    kind = UNetConfig if plan.network == "unet" else MMDiTConfig
    return kind.from_diffusers(plan.configs[plan.network], plan.path)


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
