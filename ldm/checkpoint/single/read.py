"""Read a single file as a Model: check its plan on the meta device, then read each byte once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.build import check_fit, clip_text, flow_text, load_network, schedule_of, t5_dtype, t5_text
from ldm.checkpoint.families import family_of
from ldm.checkpoint.folder import card_settings, digest_of
from ldm.checkpoint.safety import Header, read_header, read_tensors
from ldm.checkpoint.single import leftovers
from ldm.checkpoint.single.flow_settings import flow_configs
from ldm.checkpoint.single.header import stored_settings
from ldm.checkpoint.single.names import FLUX_VAE, UNET, VAE, Destination, Part, destination_of, vae_part
from ldm.checkpoint.single.plan import Plan, clips_of, fp8_kinds, group_of, named, network_of, pooled_width
from ldm.checkpoint.single.tokenizers import clips, digests_of_given, unpack
from ldm.checkpoint.single.vae_sizes import vae_sizes
from ldm.checkpoint.types import Model
from ldm.console import progress, say
from ldm.device import dtype_name
from ldm.errors import ModelError

if TYPE_CHECKING:
    import torch

    from ldm.nn.mmdit import MMDiT
    from ldm.nn.text import TextEncoder
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE as Autoencoder

SHOWN = 5  # names of keys that a message lists


def read_single(path: Path, device: torch.device, dtype: torch.dtype, plan: Plan) -> Model:
    """The model of a file with this plan; `vae` is None where the plan skips it, `hash` is the file's sha256.

    Raises ModelError for shapes that do not fit, before any tensor is read, and for weights that are not finite.
    """
    with named(path):
        schedule = schedule_of(plan.configs["scheduler"], plan.configs[plan.network])
    unet, _, text = _build(plan, _on_meta(plan))
    channels = plan.configs["vae"].get("latent_channels", 4)
    check_fit(unet.config, channels, text.width, path, pooled_width(plan))
    if plan.leftovers:
        say(f"{path.name}: {leftovers.told(plan.leftovers)}")
    if plan.network == "transformer" and len(plan.tokenizers) == len(clips_of(plan.configs)) > 1:
        say(f"{path.name}: holds no T5, and SD3 reads with CLIP alone")
    size = sum(one.path.stat().st_size for one in plan.files)
    with progress(total=size, desc=f"loading {path.name}", unit="B", disable=size < 1 << 30) as bar:
        states, digest = _read(plan, device, dtype, bar.update)
    unet, vae, text = _build(plan, states)
    for module in (unet, *(() if vae is None else (vae.module,)), *text.modules):
        module.requires_grad_(False)
    info = {**card_settings(plan.card or ""), "family": plan.family}
    info.pop("commit", None)  # models from the hub alone have one, and a card proves nothing
    info |= {"ignored_keys": dict(plan.ignored)} if plan.ignored else {}
    for kind in sorted(fp8_kinds(plan)):
        say(f"{path.name}: weights in {kind} are read as {dtype_name(dtype)}, which holds every value of theirs")
    return Model(unet, vae, text, schedule, path.stem, path.resolve(), digest, info)


def text_on_meta(plan: Plan) -> TextEncoder:
    """The text encoder without its weights, which can tokenize."""
    return _build(plan, _on_meta(plan))[2]


def _on_meta(plan: Plan) -> dict[str, dict[str, torch.Tensor]]:
    """The file's tensors without memory, to check whether they fit."""
    import torch

    names = {destination.part for one in plan.files for destination in one.destinations.values()}
    states = {
        part: {name: torch.empty(shape, device="meta") for name, shape in plan.shapes(part).items()} for part in names
    }
    return _with_projection(plan, states)


def _with_projection(plan: Plan, states: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """The same; CLIP-L of an SD3 file gets a projection that changes nothing, as the original code has none."""
    import torch

    state, config = states.get("text_encoder", {}), plan.configs["text_encoder"]
    projects = str(config.get("architectures")).count("WithProjection")
    if plan.network == "transformer" and projects and not plan.own_projection and state:
        like = next(iter(state.values()))
        state["text_projection.weight"] = torch.eye(config["hidden_size"], dtype=like.dtype, device=like.device)
    return states


def _build(
    plan: Plan, states: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[UNet | MMDiT, Autoencoder, TextEncoder]:
    """The networks that hold the tensors of `states` (part -> name -> tensor). Raises ModelError."""
    from ldm.nn.vae import VAE as Autoencoder

    with named(plan.path), TemporaryDirectory() as files:
        name = "the U-Net" if plan.network == "unet" else "the transformer"
        unet = load_network(network_of(plan), states[plan.network], name)
        vae = Autoencoder.from_state(plan.configs["vae"], states["vae"], "the VAE") if "vae" in states else None
        return unet, vae, _text(plan, states, Path(files))


def _text(plan: Plan, states: Mapping[str, Mapping[str, torch.Tensor]], files: Path) -> TextEncoder:
    from ldm.nn.text import XLText

    texts: list[Any] = []
    for part in sorted(plan.tokenizers):
        config, state, stored = plan.configs[part], states[part], plan.tokenizers[part]
        if config.get("model_type") == "t5":
            texts.append(t5_text(config, state, unpack(stored, files / part), part))
        else:
            texts.append(clip_text(config, state, clips(stored, files / part), part, stored.get("words")))
    if plan.network == "transformer":
        return flow_text(network_of(plan), texts)
    return texts[0] if len(texts) == 1 else XLText(*texts, plan.zero_empty)


def _read(
    plan: Plan, device: torch.device, dtype: torch.dtype, advance: Callable[[int], object]
) -> tuple[dict[str, dict[str, torch.Tensor]], str]:
    """(part -> name in the folder -> tensor, one sha256); every byte is read once, T5's in a dtype of its own."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    digests = []
    t5 = {part for part in plan.tokenizers if plan.configs[part].get("model_type") == "t5"}
    of_t5 = t5_dtype(dtype) if t5 else dtype
    for path, _, destinations in plan.files:
        own = {key: of_t5 for key, destination in destinations.items() if destination.part in t5}
        tensors, digest = read_tensors(path, dtype, device, advance, destinations, own)
        digests.append(digest)
        for key, destination in destinations.items():
            state = states.setdefault(destination.part, {})
            state |= zip(destination.names, pieces(tensors.pop(key), destination))
    return _with_projection(plan, states), hash_of_files([*digests, *digests_of_given(plan.tokenizers)])


def hash_of_files(digests: Sequence[str]) -> str:
    """The hash of a model that is read from files with these sha256: the only one's own, or one over all."""
    return digests[0] if len(digests) == 1 else digest_of({f"{i:02d}": digest for i, digest in enumerate(digests)})


def pieces(tensor: torch.Tensor, destination: Destination) -> list[torch.Tensor]:
    """The tensor in the folder's form: cut into q, k and v (each with memory of its own), transposed, flat, swapped."""
    if len(destination.names) > 1:
        return [piece.clone() for piece in tensor.split(destination.rows(len(tensor)))]
    if destination.change == "transposed":
        return [tensor.t().contiguous()]
    if destination.change == "swapped":
        return [tensor.roll(len(tensor) // 2, 0)]
    return [tensor.flatten(1) if destination.change == "flat" else tensor]


def read_vae(
    path: Path, device: torch.device, dtype: torch.dtype, like: Mapping[str, Any] | None
) -> tuple[Autoencoder, str]:
    """(the autoencoder in a file, the file's sha256). The file holds a whole model or an autoencoder alone.

    An autoencoder alone may have its original names or diffusers'. They do not tell the scale of its latents, so it
    gets the settings `like`, those of the model that it is for, in its own size. Raises ModelError.
    """
    from ldm.nn.vae import VAE as Autoencoder

    header = read_header(path)
    prefix = vae_prefix(header, path)
    settings = stored_settings(header, path)
    if settings is not None:
        config = settings["configs"]["vae"]
    elif any(key.startswith(UNET) for key in header.tensors):
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        flow = flow_configs(shapes, path)
        config = family_of(shapes, path).vae if flow is None else flow["vae"]
    elif like is not None:
        config = _of_size(like, {key.removeprefix(prefix): one.shape for key, one in header.tensors.items()}, path)
    else:
        raise ModelError("is an autoencoder without settings", where=path, hint="give its folder, with config.json")
    diffusers_names = any(key.startswith(f"{prefix}decoder.up_blocks.") for key in header.tensors)
    part = Part("vae", (prefix,), {}) if diffusers_names else vae_part(config, prefix)
    inside = {
        key: destination_of(part, key) for key in header.tensors if key.startswith(prefix) and not group_of(key, part)
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


def _of_size(like: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> Mapping[str, Any]:
    """`like`, with the sizes that the tensors tell where these are others."""
    try:
        sizes = vae_sizes(shapes, path)
    except ModelError:  # of a width that does not tell its groups: loading compares it with `like`
        return like
    same = all(list(like.get(name, ())) == sizes[name] for name in ("block_out_channels", "down_block_types"))
    return like if same else {**like, **sizes}


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


def vae_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of an autoencoder's tensors in a file. Raises ModelError where there is none."""
    header = read_header(path)
    prefix = vae_prefix(header, path)
    return {key: tensor.shape for key, tensor in header.tensors.items() if key.startswith(prefix)}


def vae_prefix(header: Header, path: Path) -> str:
    """The prefix of the autoencoder's names in a file. Raises ModelError where there is no autoencoder."""
    for prefix in (VAE, FLUX_VAE, ""):
        if any(key.startswith(f"{prefix}decoder.") for key in header.tensors):
            return prefix
    raise ModelError("holds no autoencoder", where=path)
