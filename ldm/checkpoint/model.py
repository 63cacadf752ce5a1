"""Models found, checked and loaded: from a diffusers folder, a single file or the hub."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint import build, single
from ldm.checkpoint import folder as layouts
from ldm.checkpoint.build import check_fit
from ldm.checkpoint.folder import default_folder, is_hub_id
from ldm.checkpoint.hub import forget, snapshot
from ldm.checkpoint.safety import read_header, read_json
from ldm.checkpoint.types import Model, check_prediction_type
from ldm.console import progress
from ldm.device import (
    check_quantization,
    is_out_of_memory,
    let_go,
    pick_device,
    pick_dtype,
    total_memory,
    without_collector,
)
from ldm.errors import ConfigError, ModelError, ResourceError

if TYPE_CHECKING:
    import torch

    from ldm.nn.vae import VAE

KEPT = 3  # loaded models that the cache holds; the one used longest ago goes first
SHARE = 0.5  # of a device's memory that they may take together
_cache: OrderedDict[tuple, Model] = OrderedDict()
_lock = threading.RLock()


def check_model(
    model: str | Path | Model = "default",
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    text_encoders: Any = None,
) -> Path | None:
    """The model's folder or file, after every check that needs no weight: a few milliseconds, no torch.

    Only the settings of a hub id are fetched. Raises ModelError; None for a loaded model without a folder.
    """
    override, skip = check_prediction_type(prediction_type), ("vae",) if vae is not None else ()
    if isinstance(model, Model):
        return model.path
    path = resolve(model, weights=False)
    if is_hub_id(str(model)):
        layouts.check_index(path)
    elif is_single(path):
        single.plan_of(path, override, skip, texts=single.listed_texts(text_encoders))
    else:
        refuse_texts(text_encoders, path)
        layouts.read_layout(path, skip)
    if vae is not None and is_single(Path(vae)):
        single.vae_facts(Path(vae))
    return path


def load_model(
    model: str | os.PathLike | Model = "default",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | os.PathLike | VAE | None = None,
    cache: bool = True,
    prediction_type: str | None = None,
    text_encoders: Any = None,
    quantization: str | None = None,
) -> Model:
    """A model in eval mode, without gradients: "default", a diffusers folder, a single file or a hub id.

    `vae` replaces the autoencoder: a folder or file of one or of a whole model, or a loaded one. `prediction_type`
    (epsilon, v_prediction, sample) overrides the model's. `text_encoders` are files and folders with what a single file
    of SD3 or FLUX lacks: CLIP-L, CLIP-G, T5, T5's tokenizer. `quantization` "int8": a flow transformer's blocks in 8
    bits (see nn/quantization.py). Calls with equal (path, file identity, dtype, device) share one model; `cache=False`
    loads a separate one, to be trained. Raises ModelError, ConfigError.
    """
    eight = check_quantization(quantization)
    if isinstance(model, Model):
        refuse_texts(text_encoders, model.path)
        if eight:
            raise ConfigError("a loaded model has its weights already", where="quantization")
        return model if vae is None else _with_vae(model, vae, model.device, model.dtype)
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if isinstance(dtype, str) else dtype
    path, file = resolve(model), vae if isinstance(vae, str | os.PathLike) else None
    override = None if prediction_type is None else check_prediction_type(prediction_type)
    read = _cached if cache else _load
    other = None if file is None else resolve_vae(file)
    texts = () if text_encoders is None else single.listed_texts(text_encoders)
    asked = path, str(model), device, dtype, other, override, texts, eight
    loaded = _in_room(lambda: read(*asked), str(model), device)
    return loaded if vae is file else _with_vae(loaded, vae, device, dtype)


def refuse_texts(text_encoders: Any, where: Any) -> None:
    """Raise ModelError for text encoders that are given to a model with text encoders of its own."""
    if text_encoders:
        what = "has text encoders already; others can be given for a single file of SD3 or FLUX"
        raise ModelError(what, where=where, hint="leave --text-encoders out")


def addable_parts(model: str | os.PathLike | Model) -> frozenset[str]:
    """Which keywords of load_model add what a model's file lacks: text_encoders for a single file of SD3 or FLUX, and
    vae for a file without one. None for folders and loaded models. Raises ModelError."""
    path = None if isinstance(model, Model) else resolve(model, weights=False)
    if path is None or not is_single(path):
        return frozenset()
    plan = single.plan_of(path, "epsilon", strict=False)
    texts = {"text_encoders"} if plan.network == "transformer" else set()
    has_vae = any(destination.part == "vae" for destination in plan.destinations.values())
    return frozenset(texts if has_vae else {*texts, "vae"})


def _in_room(read: Callable[[], Model], name: str, device: torch.device) -> Model:
    """What `read` returns; where memory runs out it is called once more without the other models of the cache."""
    try:
        return read()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    _make_room(name, device)
    return _in_room(read, name, device)


def _make_room(name: str, device: torch.device) -> None:
    """Let the models of the cache go. Raises ResourceError where there are none."""
    with _lock:
        others = len(_cache)
        _cache.clear()
    let_go()
    if not others:
        hint = "use offload, a smaller dtype or another device"
        raise ResourceError(f"out of memory in loading {name} to {device}", where="model", hint=hint)


def clear_cache() -> None:
    """Drop every loaded model, and the commits of hub ids; models in use stay with their users."""
    forget()
    with _lock:
        _cache.clear()


def _cached(
    folder: Path,
    name: str,
    device,
    dtype,
    vae: Path | None,
    override: str | None,
    texts: tuple[Path, ...],
    quantization: str | None = None,
) -> Model:
    """The model from the cache, loaded once for all threads; older versions of the same files are dropped."""
    source = (folder.resolve(), vae and vae.resolve(), str(device), str(dtype), override, texts, quantization)
    with _lock:
        files = [path for path in (folder, vae, *texts) if path is not None]
        key = (source, *(layouts.identity(path) for path in files))
        if key not in _cache:
            with without_collector():
                loaded = _load(folder, name, device, dtype, vae, override, texts, quantization)
            for old in [old for old in _cache if old[0] == source]:
                del _cache[old]
            _cache[key] = loaded
        _cache.move_to_end(key)
        while len(_cache) > KEPT or (len(_cache) > 1 and _held(device) > SHARE * total_memory(device)):
            _cache.popitem(last=False)
        return _cache[key]


def _held(device: torch.device) -> int:
    """Bytes of the cached models' weights on a device."""
    from ldm.nn.quantization import stored_bytes

    networks = [n for model in _cache.values() for n in (model.unet, model.vae.module, *model.text.modules)]
    held = (p for network in networks for p in network.parameters() if p.device.type == device.type)
    return sum(map(stored_bytes, held))


def resolve(model: str | os.PathLike, weights: bool = True) -> Path:
    """The path of a model: the default one, a hub id's snapshot (`weights=False`: settings alone), a folder or file."""
    if str(model) == "default":
        return default_folder()
    if not str(model):
        raise ModelError("the model's name is empty", hint="name a folder, or leave --model out")
    if is_hub_id(str(model)):
        return snapshot(str(model), weights)
    path = Path(os.path.expanduser(model))
    try:
        path.exists()
    except OSError as error:  # such as a name that is too long
        raise ModelError(f"cannot be a path ({error.strerror})", where=str(model)[:80]) from None
    return path


def resolve_vae(vae: str | os.PathLike) -> Path:
    """The autoencoder's file, or the folder with its config.json: this folder, or `vae/` in it."""
    folder = resolve(vae)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def is_single(path: Path) -> bool:
    """Whether this is a .safetensors file; the reader of folders refuses any other file."""
    return path.is_file() and path.suffix.lower() == ".safetensors"


def _load(
    path: Path,
    name: str,
    device,
    dtype,
    vae: Path | None,
    override: str | None,
    texts: tuple[Path, ...] = (),
    quantization: str | None = None,
) -> Model:
    """The model with another autoencoder and prediction type, where these are given."""
    import torch

    from ldm.nn.batch_invariant import layout

    place = torch.device("cpu") if quantization else device  # which may have no room for the 16 bits
    if is_single(path):
        plan = single.plan_of(path, override, ("vae",) if vae else (), texts=texts)
        loaded = single.read_single(path, place, dtype, plan)
    else:
        refuse_texts(texts, path)
        loaded = _load_folder(path, name, place, dtype, vae)
    loaded.unet.to(memory_format=layout(device, dtype, loaded.unet.config))
    if override is not None and override != loaded.schedule.prediction_type:
        loaded.schedule = dataclasses.replace(loaded.schedule, prediction_type=override)
    loaded = loaded if vae is None else _with_vae(loaded, vae, device, dtype)
    if device.type == "cpu":
        loaded.vae.to(memory_format=torch.channels_last)  # measured: decoding takes 0.84 of the time, in bf16 0.73
    return _in_8_bits(loaded, device) if quantization else loaded


def _in_8_bits(model: Model, device: torch.device) -> Model:
    """The model on `device`, its transformer's blocks in 8 bits. Changes its networks."""
    from ldm.nn.mmdit import MMDiT
    from ldm.nn.quantization import quantized

    if not isinstance(model.unet, MMDiT):
        raise ConfigError("is for SD3 and FLUX, and this is a U-Net", where="quantization", hint="leave it out")
    unet = quantized(model.unet, device)
    model.vae.to(device)
    return dataclasses.replace(model, unet=unet, text=model.text.to(device))


def settings_of(path: Path | None) -> Mapping[str, Mapping[str, Any]]:
    """Component -> settings of a model's folder or single file (`vae` alone of an autoencoder's), where readable.

    Reads no weight, imports no torch, and leaves errors to loading.
    """
    if path is None:
        return {}
    try:
        if is_single(path):
            return single.plan_of(path, "epsilon", ("vae",), strict=False).configs
        names = {"vae": "vae/config.json", "scheduler": "scheduler/scheduler_config.json"}
        paths = {part: path / name for part, name in names.items() if (path / name).is_file()}
        return {part: read_json(file) for part, file in (paths or {"vae": path / "config.json"}).items()}
    except ModelError:
        return {}


def vae_settings(path: Path) -> Mapping[str, Any]:
    """The settings of an autoencoder's folder or file; of a file without any, what its tensors say.

    {} where a folder has none, which loading refuses. Raises ModelError for a file without an autoencoder.
    """
    settings = settings_of(path).get("vae", {})
    return settings or (single.vae_facts(path) if is_single(path) else {})


def card_of(model: Model) -> str | None:
    """The text of the model card that came with a loaded model."""
    if model.path is None:
        return None
    if is_single(model.path):
        return (single.stored_settings(read_header(model.path), model.path) or {}).get("card")
    return layouts.read_card(model.path)


def _load_folder(folder: Path, name: str, device, dtype, vae_path: Path | None) -> Model:
    """Settings, checks, then weights, part by part; without the autoencoder where another one replaces it."""
    from ldm.diffusion.diffusers_config import read_stepping

    layout = layouts.read_layout(folder, skip=("vae",) if vae_path else ())
    digests = layouts.check_settings(layout)
    schedule = build.schedule_of(layout.configs["scheduler"], layout.configs[layout.network])
    vae_config = vae_settings(vae_path) if vae_path else layout.configs["vae"]
    width, pooled = build.text_widths(layout)
    config = build.network_config(layout)
    build.check_fit(config, vae_config.get("latent_channels", 4), width, folder, pooled)
    total = sum(path.stat().st_size for part in layout.weights for path in layout.shards(part))
    with progress(total=total, desc=f"loading {name}", unit="B", disable=total < 1 << 30) as bar:
        state = {part: build.read_part(layout, part, dtype, device, digests, bar.update) for part in layout.weights}
    unet = build.load_network(config, state.pop(layout.network), folder / layout.network)
    text = build.build_text(layout, {part: state.pop(part) for part in layout.texts()})
    vae = None if vae_path else build.build_vae(layout.configs["vae"], state.pop("vae"), folder / "vae")
    for module in (unet, *text.modules, *(() if vae is None else (vae.module,))):
        module.requires_grad_(False)
    ignored = [part for part in layouts.IGNORED if layout.index.get(part) not in (None, [None, None])]
    hub, t5 = name != "default" and is_hub_id(name), layout.text_class("text_encoder") in layouts.T5
    ours = (t5 and layouts.T5_LAYOUT) or (layout.index["_class_name"] == layouts.CLIP_PIPELINE and layouts.CLIP_LAYOUT)
    known = {"ignored": ignored, "layout": ours, "commit": hub and folder.name}
    info = layouts.card_settings(layouts.read_card(folder) or "")
    if stepping := read_stepping(layout.configs["scheduler"])[0]:
        info["ldm"] = {**stepping, **(info["ldm"] if isinstance(info.get("ldm"), Mapping) else {})}
    info.pop("commit", None)  # a card proves nothing
    info |= {key: value for key, value in known.items() if value}
    short = name if name == "default" or hub else folder.resolve().name
    return Model(unet, vae, text, schedule, short, folder.resolve(), layouts.digest_of(digests), info)


def load_vae(
    path: Path, device: torch.device, dtype: torch.dtype, like: Mapping[str, Any] | None = None
) -> tuple[VAE, dict[str, str]]:
    """An autoencoder from its folder (config.json and weights) or a file, and the sha256 of each file read.

    A file with an autoencoder alone has no settings: it gets `like`. Raises ModelError.
    """
    if is_single(path):
        vae, digest = single.read_vae(path, device, dtype, like)
        return vae, {"vae": digest}
    layout = layouts.vae_layout(path)
    digests: dict[str, str] = {}
    state = build.read_part(layout, "vae", dtype, device, digests)
    digests |= layouts.check_settings(layout)
    vae = build.build_vae(layout.configs["vae"], state, path)
    return vae, {f"vae/{name}": digest for name, digest in digests.items()}


def load_vae_of(model: Model, vae: str | os.PathLike | None = None, *, device: torch.device, dtype: torch.dtype) -> VAE:
    """A loaded model's own autoencoder, or `vae` in its place, read from its files in another dtype. Raises ModelError.

    An autoencoder's file without settings gets those of the model's.
    """
    path = model.path if vae is None else vae
    assert path is not None  # a model that is read from files
    return load_vae(resolve_vae(path), device, dtype, settings_of(model.path).get("vae"))[0]


def _with_vae(model: Model, vae: str | Path | VAE, device, dtype) -> Model:
    """A copy of the model with another autoencoder."""
    digests = {"model": model.hash, "vae": "of the caller"}
    if isinstance(vae, str | Path):
        vae, extra = load_vae(resolve_vae(vae), device, dtype, settings_of(model.path).get("vae"))
        digests |= extra
    check_fit(model.unet.config, vae.latent_channels, model.text.width, model.path)
    return dataclasses.replace(model, vae=vae, hash=layouts.digest_of(digests))
