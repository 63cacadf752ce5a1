"""Models found, checked and loaded: from a diffusers folder, a single file or the hub."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint import build, single
from ldm.checkpoint import folder as layouts
from ldm.checkpoint.build import check_fit
from ldm.checkpoint.default import default_folder
from ldm.checkpoint.hub import forget, is_hub_id, snapshot
from ldm.checkpoint.safety import read_header, read_json
from ldm.checkpoint.types import Model
from ldm.console import progress
from ldm.device import pick_device, pick_dtype
from ldm.errors import ModelError

if TYPE_CHECKING:
    import torch

    from ldm.nn.vae import VAE

KEPT = 3  # loaded models that the cache holds; the one used longest ago goes first
_cache: OrderedDict[tuple, Model] = OrderedDict()
_lock = threading.RLock()


def check_model(
    model: str | Path | Model = "default", vae: str | Path | None = None, prediction_type: str | None = None
) -> Path | None:
    """The model's folder or file, after every check that needs no weight: a few milliseconds, no torch.

    Of a hub id only the settings are fetched. Raises ModelError in one line; None for a loaded model without a folder.
    """
    asked, skip = single.check_prediction_type(prediction_type), ("vae",) if vae is not None else ()
    if isinstance(model, Model):
        return model.path
    place = resolve(model, weights=False)
    if is_hub_id(str(model)):
        layouts.check_index(place)
    elif is_single(place):
        single.plan_of(place, asked, skip)
    else:
        layouts.read_layout(place, skip)
    if vae is not None and is_single(Path(vae)):
        single.vae_prefix(read_header(vae), Path(vae))
    return place


def load_model(
    model: str | Path | Model = "default",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | Path | VAE | None = None,
    cache: bool = True,
    prediction_type: str | None = None,
) -> Model:
    """A model in eval mode, without gradients: "default", a diffusers folder, a single file or a hub id.

    `vae` takes the autoencoder from elsewhere: its own folder or file, a whole model's, or a loaded one.
    `prediction_type` (epsilon, v_prediction, sample) overrides what the model says of itself. A loaded model is given
    back. Models are shared by (path, file identity, dtype, device); `cache=False` gives one of your own, to be trained.
    Raises ModelError.
    """
    if isinstance(model, Model):
        return model if vae is None else _with_vae(model, vae, model.device, model.dtype)

    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if isinstance(dtype, str) else dtype
    folder = resolve(model)
    own_vae = vae if isinstance(vae, str | Path | None) else None
    vae_folder = _resolve_vae(own_vae) if own_vae is not None else None
    asked = single.check_prediction_type(prediction_type)
    read = _cached if cache else _load
    loaded = read(folder, str(model), device, dtype, vae_folder, asked)
    return loaded if vae is own_vae else _with_vae(loaded, vae, device, dtype)


def clear_cache() -> None:
    """Forget every loaded model, and which commit a hub id means; those in use stay with their users."""
    forget()
    with _lock:
        _cache.clear()


def _cached(folder: Path, name: str, device, dtype, vae: Path | None, asked: str | None) -> Model:
    """The model from the cache, loaded once however many threads ask; older versions of the same files are dropped."""
    place = (folder.resolve(), vae and vae.resolve(), str(device), str(dtype), asked)
    with _lock:
        key = (place, layouts.identity(folder), vae and layouts.identity(vae))
        if key not in _cache:
            loaded = _load(folder, name, device, dtype, vae, asked)
            for old in [old for old in _cache if old[0] == place]:
                del _cache[old]
            _cache[key] = loaded
        _cache.move_to_end(key)
        while len(_cache) > KEPT:
            _cache.popitem(last=False)
        return _cache[key]


def resolve(model: str | Path, weights: bool = True) -> Path:
    """Where a model's files are: the default one's, a hub id's snapshot (`weights=False`: settings alone), a path."""
    if str(model) == "default":
        return default_folder()
    if not str(model):
        raise ModelError("the model's name is empty", todo="name a folder, or leave --model out")
    return snapshot(str(model), weights) if is_hub_id(str(model)) else Path(model).expanduser()


def _resolve_vae(vae: str | Path) -> Path:
    """The file, or the folder that holds the autoencoder's config.json: the one named, or `vae/` in it."""
    folder = resolve(vae)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def is_single(place: Path) -> bool:
    """Whether this is (or is named like) a single file; any other file is left to the reader of folders to refuse."""
    return place.is_file() and place.suffix.lower() == ".safetensors"


def _load(place: Path, name: str, device, dtype, vae: Path | None, asked: str | None) -> Model:
    """The model with every change that was asked for."""
    import torch

    from ldm.nn.batch_invariant import layout

    if is_single(place):
        plan = single.plan_of(place, asked, ("vae",) if vae else ())
        loaded = single.read_single(place, device, dtype, plan)
    else:
        loaded = _load_folder(place, name, device, dtype, vae)
    loaded.unet.to(memory_format=layout(loaded.device, loaded.dtype))
    if asked is not None and asked != loaded.schedule.prediction_type:
        loaded.schedule = dataclasses.replace(loaded.schedule, prediction_type=asked)
    loaded = loaded if vae is None else _with_vae(loaded, vae, device, dtype)
    if loaded.device.type == "cpu":
        loaded.vae.to(memory_format=torch.channels_last)  # measured: decoding takes 0.84 of the time, in bf16 0.73
    return loaded


def settings_of(place: Path | None) -> Mapping[str, Mapping[str, Any]]:
    """Component -> settings of a model's folder or single file (`vae` of an autoencoder's), as far as can be read.

    Reads no weight, imports no torch, and leaves it to loading to say what is wrong.
    """
    if place is None:
        return {}
    try:
        if is_single(place):
            return single.plan_of(place, "epsilon", ("vae",)).configs
        names = {"vae": "vae/config.json", "scheduler": "scheduler/scheduler_config.json"}
        found = {part: place / name for part, name in names.items() if (place / name).is_file()}
        return {part: read_json(path) for part, path in (found or {"vae": place / "config.json"}).items()}
    except ModelError:
        return {}


def card_of(model: Model) -> str | None:
    """The text of the model card that came with a loaded model."""
    if model.path is None:
        return None
    if is_single(model.path):
        return (single.own_settings(read_header(model.path), model.path) or {}).get("card")
    return layouts.read_card(model.path)


def _load_folder(folder: Path, name: str, device, dtype, own_vae: Path | None) -> Model:
    """Settings, checks, then weights, part by part; without the autoencoder where the user has one of his own."""
    from ldm.diffusion.schedule import Schedule

    layout = layouts.read_layout(folder, skip=("vae",) if own_vae else ())
    digests = layouts.check_settings(layout)
    schedule = Schedule.from_diffusers(dict(layout.configs["scheduler"]))
    vae_config = settings_of(own_vae).get("vae", {}) if own_vae else layout.configs["vae"]
    width, pooled = build.text_widths(layout)
    build.check_fit(build.unet_config(layout), vae_config.get("latent_channels", 4), width, folder, pooled)
    total = sum(path.stat().st_size for part in layout.weights for path in layout.shards(part))
    with progress(total=total, desc=f"loading {name}", unit="B", disable=total < 1 << 30) as bar:
        state = {part: build.read_part(layout, part, dtype, device, digests, bar.update) for part in layout.weights}
    unet = build.build_unet(layout, state.pop("unet"))
    text = build.build_text(layout, {part: state.pop(part) for part in layout.texts()})
    vae = None if own_vae else build.build_vae(layout.configs["vae"], state.pop("vae"), folder / "vae")
    for module in (unet, *text.modules, *(() if vae is None else (vae.module,))):
        module.requires_grad_(False)
    ignored = [part for part in layouts.IGNORED if layout.index.get(part) not in (None, [None, None])]
    info = {**layouts.card_settings(layouts.read_card(folder) or ""), **({"ignored": ignored} if ignored else {})}
    if layout.text_class("text_encoder") in layouts.T5:
        info["layout"] = layouts.T5_LAYOUT
    info.pop("commit", None)  # a card's word for it is no proof
    if is_hub_id(name):
        info["commit"] = folder.name
    short = name if name == "default" or is_hub_id(name) else folder.resolve().name
    return Model(unet, vae, text, schedule, short, folder.resolve(), layouts.digest_of(digests), info)


def load_vae(
    place: Path, device: torch.device, dtype: torch.dtype, like: Mapping[str, Any] | None = None
) -> tuple[VAE, dict[str, str]]:
    """An autoencoder from its own folder (config.json and weights) or a file, and the sha256 of what was read.

    A file that holds nothing else has no settings: it gets those of `like`. Raises ModelError.
    """

    if is_single(place):
        vae, digest = single.read_vae(place, device, dtype, like)
        return vae, {"vae": digest}
    layout = layouts.vae_layout(place)
    digests: dict[str, str] = {}
    state = build.read_part(layout, "vae", dtype, device, digests)
    digests |= layouts.check_settings(layout)
    vae = build.build_vae(layout.configs["vae"], state, place)
    return vae, {f"vae/{name}": digest for name, digest in digests.items()}


def _with_vae(model: Model, vae: str | Path | VAE, device, dtype) -> Model:
    """The same model with another autoencoder; the first stays as it is."""

    digests = {"model": model.hash, "vae": "of the caller"}
    if isinstance(vae, str | Path):
        vae, extra = load_vae(_resolve_vae(vae), device, dtype, settings_of(model.path).get("vae"))
        digests |= extra
    check_fit(model.unet.config, vae.latent_channels, model.text.width, model.path)
    return dataclasses.replace(model, vae=vae, hash=layouts.digest_of(digests))
