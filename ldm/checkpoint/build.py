"""Build the four parts of a model from a checked folder: settings first, then each weight file once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.folder import OTHER_TOWERS, T5, WORDS, Layout, check_digest, read_json
from ldm.checkpoint.safety import Advance, read_tensors, silent
from ldm.console import say
from ldm.errors import LdmError, ModelError

if TYPE_CHECKING:
    import torch

    from ldm.diffusion.schedule import Schedule
    from ldm.nn.mmdit import MMDiT, MMDiTConfig
    from ldm.nn.text import ClipText, FlowText, T5Text, TextEncoder
    from ldm.nn.unet import UNet, UNetConfig
    from ldm.nn.vae import VAE

PREFIX = "text_model."  # of CLIP's keys in files; transformers 5 leaves it out of CLIPTextModel
TIED = "encoder.embed_tokens.weight"  # T5's second name for shared.weight


def network_config(layout: Layout) -> UNetConfig | MMDiTConfig:
    """The settings in the `config.json` of `unet` or `transformer`. Raises ModelError for unsupported ones."""
    from ldm.nn.mmdit_config import MMDiTConfig
    from ldm.nn.unet_config import UNetConfig

    where, config = layout.folder / layout.network / "config.json", layout.configs[layout.network]
    kind = UNetConfig if layout.network == "unet" else MMDiTConfig
    return _checked(lambda: kind.from_diffusers(config, where), where)


def load_network(config: UNetConfig | MMDiTConfig, state: Mapping[str, torch.Tensor], where: object) -> UNet | MMDiT:
    """The network of these settings with these tensors. Raises ModelError where they do not fit."""
    from ldm.nn.mmdit import MMDiTConfig, load_mmdit
    from ldm.nn.unet import load_unet

    return load_mmdit(config, state, where) if isinstance(config, MMDiTConfig) else load_unet(config, state, where)


def schedule_of(scheduler: Mapping[str, Any], network: Mapping[str, Any]) -> Schedule:
    """The schedule of scheduler_config.json and the network's config.json: FLUX has steps of its own. ModelError."""
    from ldm.diffusion.diffusers_config import read_scheduler
    from ldm.nn.mmdit_config import FLUX, SD3

    schedule, name = read_scheduler(dict(scheduler)), network.get("_class_name")
    return _of_transformer(schedule, scheduler, name == FLUX) if name in (SD3, FLUX) else schedule


def _of_transformer(schedule: Schedule, scheduler: Mapping[str, Any], flux: bool) -> Schedule:
    if schedule.whole_timesteps:
        what = f"{scheduler.get('_class_name')} does not go with a flow transformer"
        raise ModelError(what, where="scheduler_config.json", hint="FlowMatchEulerDiscreteScheduler does")
    return dataclasses.replace(schedule, spacing="trailing") if flux else schedule


def build_vae(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], folder: Path) -> VAE:
    """The autoencoder of a `config.json` with these tensors; keys of older files are accepted too."""
    from ldm.nn.vae import VAE

    return _checked(lambda: VAE.from_state(config, state, folder), folder / "config.json")


def build_text(layout: Layout, states: Mapping[str, Mapping[str, torch.Tensor]]) -> TextEncoder:
    """The folder's text encoders with these tensors (component -> name -> tensor) and tokenizers. Raises ModelError."""
    from ldm.nn.text import XLText

    if layout.network == "transformer" and len(layout.texts()) > 1:
        return _flow_text(layout, states)
    if layout.text_class("text_encoder") in T5:
        config, where = layout.configs["text_encoder"], layout.folder / "text_encoder"
        return t5_text(config, states["text_encoder"], layout.tokenizer("text_encoder"), where)
    first, *more = (_build_clip(layout, part, states[part]) for part in layout.texts())
    if not more:
        return first
    zero_empty = bool(layout.index.get("force_zeros_for_empty_prompt", True))
    return _checked(lambda: XLText(first, *more, zero_empty), layout.folder)


def _flow_text(layout: Layout, states: Mapping[str, Mapping[str, torch.Tensor]]) -> FlowText:
    texts: list[Any] = []
    for part in layout.texts():
        if layout.text_class(part) in T5:
            where = layout.folder / part
            texts.append(t5_text(layout.configs[part], states[part], layout.tokenizer(part), where))
        else:
            texts.append(_build_clip(layout, part, states[part]))
    return _checked(lambda: flow_text(network_config(layout), texts), layout.folder)


def flow_text(config: Any, texts: Sequence[ClipText | T5Text]) -> FlowText:
    """The text encoders of SD3 or FLUX (`config` is the transformer's) as one. Raises ModelError."""
    from ldm.nn.text import FlowText, T5Text
    from ldm.nn.text.flow import DEV_TOKENS, SCHNELL_TOKENS, SD3_TOKENS

    clips: list[Any] = [text for text in texts if not isinstance(text, T5Text)]
    t5 = next((text for text in texts if isinstance(text, T5Text)), None)
    tokens = SD3_TOKENS if not config.is_flux else DEV_TOKENS if config.guidance_embeds else SCHNELL_TOKENS
    first, second = clips if len(clips) > 1 else (*clips, None)
    return FlowText(first, second, t5, config.text_width, tokens)


def t5_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of T5 in a model of this one: its feed-forward layers overflow in fp16, so bf16 then; this is said."""
    import torch

    if dtype != torch.float16:
        return dtype
    say("T5 is kept in bf16: in fp16 it overflows")
    return torch.bfloat16


def _build_clip(layout: Layout, part: str, state: Mapping[str, torch.Tensor]) -> ClipText:
    where = layout.tokenizer(part)
    words = read_json(where / WORDS).get("words") if (where / WORDS).is_file() else None
    config = {**layout.configs[part], "architectures": [layout.text_class(part)]}
    return clip_text(config, state, clip_tokenizer(where), layout.folder / part, words)


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer of a checked folder, from either form of its files. Raises ModelError."""
    from transformers import CLIPTokenizer

    return _checked(lambda: CLIPTokenizer.from_pretrained(str(folder), local_files_only=True), folder)


def clip_text(
    config: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    tokenizer: Any,
    where: object,
    words: Iterable[str] | None = None,
) -> ClipText:
    """CLIP's text encoder from config.json and tensors, in eval mode; keys may begin with `text_model.` or not.

    config["architectures"][0] is CLIPTextModel (the default) or CLIPTextModelWithProjection; `words` are those that it
    was trained on, where they are known. Raises ModelError where tensors or tokenizer do not fit.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ldm.nn.text import ClipText
    from ldm.nn.weights import load_weights, on_meta

    projected = (config.get("architectures") or ("",))[0] == "CLIPTextModelWithProjection"
    encoder_class = CLIPTextModelWithProjection if projected else CLIPTextModel
    settings = _checked(lambda: CLIPTextConfig.from_dict(dict(config)), where)
    encoder = _checked(lambda: on_meta(lambda: encoder_class(settings)), where)
    load_weights(encoder, named_as(state, encoder.state_dict()), where)
    for name, buffer in list(encoder.named_buffers()):  # not in the files: the positions 0, 1, 2, …
        if buffer.is_meta and name.endswith("position_ids"):
            device = next(encoder.parameters()).device
            positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            encoder.get_submodule(name.rpartition(".")[0]).position_ids = positions
    return _checked(lambda: ClipText(encoder, tokenizer, None if words is None else frozenset(words)), where)


def t5_text(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], tokenizer: Path, where: object) -> T5Text:
    """T5's encoder from config.json and tensors, in eval mode, with the tokenizer of a folder. Raises ModelError."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from ldm.nn.text import T5Text
    from ldm.nn.weights import load_weights, on_meta

    settings = _checked(lambda: T5Config.from_dict(dict(config)), where)
    encoder = _checked(lambda: on_meta(lambda: T5EncoderModel(settings)), where)
    names = encoder.state_dict().keys()
    shared = state.get("shared.weight", state.get(TIED))  # one table under one or both of its names
    tensors = {
        **state,
        **({} if shared is None else {name: shared for name in ("shared.weight", TIED) if name in names}),
    }
    load_weights(encoder, tensors, where)
    encoder.set_input_embeddings(encoder.shared)
    read = _checked(lambda: PreTrainedTokenizerFast.from_pretrained(str(tokenizer), local_files_only=True), tokenizer)
    return _checked(lambda: T5Text(encoder, read), tokenizer)


def text_widths(layout: Layout) -> tuple[int, int | None]:
    """Widths of the text's states and of the pooled text, from the configs; T5 has no pooled text."""
    configs = [layout.configs[part] for part in layout.texts()]
    if layout.network == "transformer" and len(configs) > 1:
        return _flow_widths(layout, configs)
    if layout.text_class("text_encoder") in T5:
        return configs[0].get("d_model", 512), None
    widths = [config.get("hidden_size", 512) for config in configs]  # defaults are CLIPTextConfig's
    projected = layout.text_class(layout.texts()[-1]).endswith("Projection")
    return sum(widths), configs[-1].get("projection_dim", 512) if projected else widths[-1]


def _flow_widths(layout: Layout, configs: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    t5 = [layout.configs[part] for part in layout.texts() if layout.text_class(part) in T5]
    clips = configs[: len(configs) - len(t5)]
    pooled = sum(one.get("projection_dim" if len(clips) > 1 else "hidden_size", 512) for one in clips)
    return t5[0].get("d_model", 512) if t5 else network_config(layout).text_width, pooled


def named_as(state: Mapping[str, torch.Tensor], known: Container[str]) -> dict[str, torch.Tensor]:
    """The text encoder's tensors, with or without the prefix `text_model.` as in `known`.

    Without position ids and what else of CLIP a text encoder does not have.
    """
    named = {}
    for key, tensor in state.items():
        other = key.removeprefix(PREFIX) if key.startswith(PREFIX) else PREFIX + key
        unused = key.endswith("embeddings.position_ids") or key.startswith((*OTHER_TOWERS, "text_projection."))
        if not unused or key in known:
            named[other if key not in known and other in known else key] = tensor
    return named


def check_fit(
    config: UNetConfig | MMDiTConfig, channels: int, width: int, where: object, pooled: int | None = None
) -> None:
    """Raise ModelError unless the network fits a VAE's latent `channels` and the widths of text and pooled text."""
    unet = hasattr(config, "cross_attention_dim")
    name = "the U-Net" if unet else "the transformer"
    widths = {"text": (config.text_width, width)}
    if pooled is not None and config.pooled_width is not None:
        widths["pooled text"] = (config.pooled_width, pooled)
    for what, (wanted, given) in widths.items():
        if wanted != given:
            raise ModelError(f"{name} is for {what} of width {wanted}, this one has {given}", where=where)
    if config.out_channels != channels or config.in_channels not in (channels, (2 * channels + 1) * unet):
        shape = f"{config.in_channels} channels in, {config.out_channels} out"
        hint = None if unet else "FLUX's Fill, Canny and Depth models are not supported"
        raise ModelError(f"{name} has {shape}, the VAE {channels} latent channels", where=where, hint=hint)


def read_part(
    layout: Layout, part: str, dtype, device, digests: dict[str, str], advance: Advance = silent
) -> dict[str, torch.Tensor]:
    """All tensors of one component, each file checked against the manifest; adds the files' sha256 to `digests`.

    T5 may get another dtype (see `t5_dtype`).
    """
    state: dict[str, torch.Tensor] = {}
    if part in layout.texts() and layout.text_class(part) in T5:
        dtype = t5_dtype(dtype)
    for path in layout.shards(part):
        tensors, digest = read_tensors(path, dtype, device, advance)
        name = path.relative_to(layout.folder).as_posix()
        digests[name] = check_digest(layout, name, digest)
        if repeated := state.keys() & tensors.keys():
            raise ModelError(f"{min(repeated)!r} is in two shards", where=path)
        state |= tensors
    return state


def _checked(build: Callable[[], Any], where: object) -> Any:
    """The result of `build`; every error that a file's settings cause becomes a ModelError."""
    try:
        return build()
    except Exception as error:
        raise _placed(error, where) from None


def _placed(error: Exception, where: object) -> LdmError:
    """The error with its place; one of another library as ModelError."""
    if not isinstance(error, LdmError):
        reason = f"{type(error).__name__}: {error}"[:200]
        return ModelError(f"the settings cannot be used ({reason})", where=where, hint="get the folder again")
    return type(error)(error.what, where=where, hint=error.hint) if error.where is None else error
