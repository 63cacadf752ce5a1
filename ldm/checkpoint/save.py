"""Write a model as a diffusers folder, whole or not at all, for diffusers, transformers and older tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint import folder as layouts
from ldm.checkpoint.build import PREFIX, TIED, check_fit
from ldm.checkpoint.safety import Advance, silent, write_manifest
from ldm.checkpoint.tensors import write_shards
from ldm.checkpoint.types import Model
from ldm.device import DTYPES, SPELLINGS
from ldm.errors import ModelError
from ldm.files import atomic_folder, require_space

if TYPE_CHECKING:
    import torch

    from ldm.nn.mmdit import MMDiT
    from ldm.nn.text import ClipText, T5Text, TextEncoder
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE

NOT_CLIPS = ("_name_or_path", "_attn_implementation", "dtype", "torch_dtype", "chunk_size_feed_forward", "id2label")
NOT_CLIPS += ("label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states")
NOT_CLIPS += ("is_encoder_decoder",)  # settings that transformers gives every config
NOT_VAES = ("_name_or_path", "_use_default_values")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def save_model(
    model: Model,
    folder: str | os.PathLike,
    dtype: str | torch.dtype = "bf16",
    max_shard_mb: float = 15,
    readme: str | None = None,
    advance: Advance = silent,
) -> Path:
    """Write the complete diffusers folder with its manifest, atomically; the folder's former content is replaced.

    Weights become `dtype` (fp32, fp16, bf16) in files of at most `max_shard_mb` million bytes (unless one tensor alone
    is larger); `readme` is the model card, `advance` is called with the number of bytes written. The model is not
    changed.
    Raises ModelError for weights that are not finite in `dtype` and parts that do not belong together, ResourceError
    where the folder cannot be written.
    """
    import torch

    from ldm.diffusion.diffusers_config import write_scheduler

    if isinstance(dtype, str):
        if dtype not in SPELLINGS:
            raise ModelError(f"weights cannot be saved as {dtype!r}", hint=f"choose from: {', '.join(DTYPES)}")
        dtype = getattr(torch, DTYPES[SPELLINGS[dtype]])
    folder, limit = Path(folder), int(max_shard_mb * 1e6)
    refuse_foreign(folder)
    check_fit(model.unet.config, model.vae.latent_channels, model.text.width, folder)
    modules = (model.unet, model.vae.module, *model.text.modules)
    require_space(folder, sum(p.numel() for m in modules for p in m.parameters()) * dtype.itemsize + 10_000_000)
    with atomic_folder(folder) as new:
        write_network(model.unet, new, dtype, limit, advance)
        write_vae(model.vae, new, dtype, limit, advance)
        write_text(model.text, new, dtype, limit, advance)
        scheduler = write_scheduler(model.schedule)
        layouts.write_json(new / "scheduler" / "scheduler_config.json", scheduler)
        layouts.write_json(new / layouts.INDEX, _index(model, scheduler["_class_name"]))
        write_manifest(new)
        if readme is not None:
            (new / layouts.CARD).write_text(readme, encoding="utf-8")
    return folder


def encoders(text: TextEncoder) -> dict[str, ClipText | T5Text]:
    """Suffix of the folder's name -> encoder. Raises ModelError for open_clip's encoders."""
    from ldm.nn.text import FlowText, OpenClipText, XLText

    texts = {"": text.first, "_2": text.second} if isinstance(text, XLText) else {"": text}
    if isinstance(text, FlowText):
        texts = dict(zip(("", "_2", "_3"), text.encoders))
    if any(isinstance(encoder, OpenClipText) for encoder in texts.values()):
        hint = "load the text encoder in transformers' form, as Stable Diffusion's folders have it"
        raise ModelError("a text encoder of open_clip cannot be saved", hint=hint)
    return texts


def _index(model: Model, scheduler: str) -> dict[str, Any]:
    """model_index.json; the text encoders and the network's inputs decide the pipeline."""
    from ldm.nn.mmdit import MMDiT
    from ldm.nn.text import ClipText, FlowText, T5Text, XLText

    if isinstance(model.text, T5Text):
        texts = {"text_encoder": layouts.T5_MODULE, "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
        return layouts.index_for(layouts.T5_PIPELINE, texts, scheduler)
    if isinstance(model.unet, MMDiT) and isinstance(model.text, ClipText):
        clip = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        return layouts.index_for(layouts.CLIP_PIPELINE, clip, scheduler)
    pipeline, texts = "StableDiffusion", {}
    if isinstance(model.text, FlowText):
        pipeline = "Flux" if model.text.is_flux else "StableDiffusion3"
        texts = {} if model.text.is_flux else {part: [None, None] for part in layouts.OPTIONAL}
    if isinstance(model.text, XLText):
        pipeline, texts = "StableDiffusionXL", {"force_zeros_for_empty_prompt": model.text.zero_empty}
    inpainting = model.unet.config.in_channels != model.vae.latent_channels
    for suffix, text in encoders(model.text).items():
        texts[f"text_encoder{suffix}"] = ["transformers", type(text.model).__name__]
        kind = "PreTrainedTokenizerFast" if isinstance(text, T5Text) else "CLIPTokenizer"
        texts[f"tokenizer{suffix}"] = ["transformers", kind]
    return layouts.index_for(pipeline + ("InpaintPipeline" if inpainting else "Pipeline"), texts, scheduler)


def refuse_foreign(folder: Path) -> None:
    """Raise ModelError for a folder that holds something else than a model, and for a file."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / layouts.INDEX).is_file()):
        raise ModelError("exists and is no model", where=folder, hint="choose a new folder")


def write_network(
    network: UNet | MMDiT, folder: Path, dtype: torch.dtype, limit: int, advance: Advance = silent
) -> None:
    """`unet/` or `transformer/` in `folder`: config.json and weights in shards of at most `limit` bytes."""
    from ldm.nn.mmdit import MMDiT

    part = "transformer" if isinstance(network, MMDiT) else "unet"
    config = {**network.config.to_diffusers(), "_diffusers_version": version("diffusers")}
    layouts.write_json(folder / part / "config.json", config)
    write_shards(folder / part, layouts.STEMS[part], network.state_dict(), dtype, limit, advance)


def write_vae(vae: VAE, folder: Path, dtype: torch.dtype, limit: int, advance: Advance = silent) -> None:
    """`vae/` in `folder`: config.json and weights in shards of at most `limit` bytes."""
    layouts.write_json(folder / "vae" / "config.json", vae_config(vae))
    write_shards(folder / "vae", layouts.STEMS["vae"], vae.module.state_dict(), dtype, limit, advance)


def vae_config(vae: VAE) -> dict[str, Any]:
    """The autoencoder's config.json."""
    config = json.loads(vae.module.to_json_string())
    config = {key: value for key, value in config.items() if key not in NOT_VAES}
    return {**config, "_diffusers_version": version("diffusers")}


def write_text(text: TextEncoder, folder: Path, dtype: torch.dtype, limit: int, advance: Advance = silent) -> None:
    """`text_encoder/` and `tokenizer/` in `folder`, also the second ones of XL; CLIP's keys begin with `text_model.`"""
    from ldm.nn.text import T5Text

    for suffix, encoder in encoders(text).items():
        target = folder / f"text_encoder{suffix}"
        layouts.write_json(target / "config.json", text_config(encoder))
        tokenizer = folder / f"tokenizer{suffix}"
        if isinstance(encoder, T5Text):
            write_tokenizer_json(encoder.tokenizer, tokenizer, "PreTrainedTokenizerFast")
        else:
            write_tokenizer(encoder.tokenizer, tokenizer, encoder.words)
        write_shards(target, layouts.STEMS["text_encoder"], text_state(encoder), dtype, limit, advance)


def text_state(text: ClipText | T5Text) -> dict[str, torch.Tensor]:
    """A text encoder's tensors by their names in files: CLIP's begin with `text_model.`, T5's has no tensor twice."""
    from ldm.nn.text import T5Text

    state = text.model.state_dict()
    if isinstance(text, T5Text):
        return {name: tensor for name, tensor in state.items() if name != TIED}
    return {_prefixed(name): tensor for name, tensor in state.items()}


def _prefixed(name: str) -> str:
    """CLIP's key with the prefix that every tool expects; a projection has none."""
    return name if name.startswith((PREFIX, "text_projection.")) else PREFIX + name


def text_config(text: ClipText | T5Text) -> dict:
    """The encoder's config.json.

    Its dtype is float32 whatever the weights' type is, under the names of transformers 4 and 5: otherwise transformers
    would load this part as stored, while diffusers loads the others in fp32.
    """
    config = json.loads(text.model.config.to_json_string(use_diff=False))
    return {
        **{key: value for key, value in config.items() if key not in NOT_CLIPS},
        "architectures": [type(text.model).__name__],
        "torch_dtype": "float32",
        "dtype": "float32",
    }


def write_tokenizer(tokenizer, folder: Path, words: Iterable[str] | None = None) -> None:
    """CLIP's tokenizer in both forms: tokenizer.json for fast tokenizers, vocab.json and merges.txt for older ones.

    `words`, where they are known, go into words.json, which only this package reads.
    """
    table = write_tokenizer_json(tokenizer, folder, "CLIPTokenizer", add_prefix_space=False)
    vocabulary = dict(table["model"]["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in table["added_tokens"]}
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in table["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    if words is not None:
        layouts.write_json(folder / layouts.WORDS, {"words": sorted(words)})


def write_tokenizer_json(tokenizer, folder: Path, kind: str, **settings: bool) -> dict[str, Any]:
    """tokenizer.json without the padding of its last call, and the settings for the class `kind`; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    if not (folder / "tokenizer.json").is_file():  # a slow tokenizer of transformers 4
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        convert_slow_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    layouts.write_json(folder / "tokenizer.json", {**table, "truncation": None, "padding": None})
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL if getattr(tokenizer, name)}
    layouts.write_json(folder / "special_tokens_map.json", special)
    settings |= {**special, "tokenizer_class": kind, "model_max_length": tokenizer.model_max_length}
    layouts.write_json(folder / "tokenizer_config.json", settings)
    return table
