"""Build the four parts of a model from a checked folder: settings first, then each weight file once."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.folder import OTHER_TOWERS, T5, WORDS, Layout, check_digest, read_json
from ldm.checkpoint.safety import Advance, read_tensors, silent
from ldm.errors import LdmError, ModelError

if TYPE_CHECKING:
    import torch

    from ldm.nn.text import ClipText, T5Text, TextEncoder
    from ldm.nn.unet import UNetConfig
    from ldm.nn.vae import VAE

PREFIX = "text_model."  # of CLIP's keys in files; transformers 5 leaves it out of CLIPTextModel
TIED = "encoder.embed_tokens.weight"  # T5's second name for shared.weight


def unet_config(layout: Layout) -> UNetConfig:
    """The settings in `unet/config.json`. Raises ModelError for unsupported ones."""
    from ldm.nn.unet import UNetConfig

    where = layout.folder / "unet/config.json"
    return _checked(lambda: UNetConfig.from_diffusers(layout.configs["unet"], where), where)


def build_vae(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], folder: Path) -> VAE:
    """The autoencoder of a `config.json` with these tensors; keys of older files are accepted too."""
    from ldm.nn.vae import VAE

    return _checked(lambda: VAE.from_state(config, state, folder), folder / "config.json")


def build_text(layout: Layout, states: Mapping[str, Mapping[str, torch.Tensor]]) -> TextEncoder:
    """The folder's text encoders with these tensors (component -> name -> tensor) and tokenizers. Raises ModelError."""
    from ldm.nn.text import XLText

    if layout.text_class("text_encoder") in T5:
        config, where = layout.configs["text_encoder"], layout.folder / "text_encoder"
        return t5_text(config, states["text_encoder"], layout.tokenizer("text_encoder"), where)
    first, *more = (_build_clip(layout, part, states[part]) for part in layout.texts())
    if not more:
        return first
    zero_empty = bool(layout.index.get("force_zeros_for_empty_prompt", True))
    return _checked(lambda: XLText(first, *more, zero_empty), layout.folder)


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
    if layout.text_class("text_encoder") in T5:
        return configs[0].get("d_model", 512), None
    widths = [config.get("hidden_size", 512) for config in configs]  # defaults are CLIPTextConfig's
    projected = layout.text_class(layout.texts()[-1]).endswith("Projection")
    return sum(widths), configs[-1].get("projection_dim", 512) if projected else widths[-1]


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


def check_fit(config: UNetConfig, channels: int, width: int, where: object, pooled: int | None = None) -> None:
    """Raise ModelError unless the U-Net fits a VAE's latent `channels` and the widths of text and pooled text."""
    widths = {"text": (config.cross_attention_dim, width)}
    if config.addition_embed_type == "text_time" and pooled is not None:
        expected = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        widths["pooled text"] = (expected, pooled)
    for name, (wanted, given) in widths.items():
        if wanted != given:
            raise ModelError(f"the U-Net is for {name} of width {wanted}, this one has {given}", where=where)
    if config.out_channels != channels or config.in_channels not in (channels, 2 * channels + 1):
        shape = f"{config.in_channels} channels in, {config.out_channels} out"
        raise ModelError(f"the U-Net has {shape}, the VAE {channels} latent channels", where=where)


def read_part(
    layout: Layout, part: str, dtype, device, digests: dict[str, str], advance: Advance = silent
) -> dict[str, torch.Tensor]:
    """All tensors of one component, each file checked against the manifest; adds the files' sha256 to `digests`."""
    state: dict[str, torch.Tensor] = {}
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
