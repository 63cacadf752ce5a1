"""The words that a fine-tuning takes: ours, those of diffusers' and kohya's training scripts, and the refused ones.

Imports nothing heavy, so that the command line can print the tables in its help.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import config
from ldm.console import say
from ldm.errors import ConfigError, nearest
from ldm.training.settings import FinetuneSettings

ALWAYS = (True, "true", "True", None)  # neutral values of a switch that asks for what happens anyway
NEVER = (False, "false", "False", None)


@dataclass(frozen=True)
class Alias:
    """Another tool's word for one of ours; `values`: what theirs are called here; `switch`: it stands for this one."""

    word: str
    values: Mapping[Any, Any] | None = None
    switch: Any = None


ALIASES: dict[str, Alias] = {
    # diffusers
    "pretrained_model_name_or_path": Alias("model"),
    "pretrained_vae_model_name_or_path": Alias("vae"),
    "dataset_name": Alias("data"),
    "train_data_dir": Alias("data"),
    "instance_data_dir": Alias("data"),
    "class_data_dir": Alias("prior"),
    "prior_loss_weight": Alias("prior_weight"),
    "rank": Alias("lora_rank"),
    "lora_layers": Alias("targets"),
    "use_dora": Alias("train", switch="dora"),
    "train_text_encoder": Alias("text_encoder", switch=True),
    "max_train_steps": Alias("steps"),
    "num_train_epochs": Alias("epochs"),
    "train_batch_size": Alias("batch_size"),
    "gradient_accumulation_steps": Alias("accumulation"),
    "lr": Alias("learning_rate"),
    "lr_scheduler": Alias("lr_schedule", {"constant_with_warmup": "constant"}),
    "lr_warmup_steps": Alias("warmup"),
    "max_grad_norm": Alias("clip"),
    "adam_weight_decay": Alias("weight_decay"),
    "use_8bit_adam": Alias("optimizer", switch="adamw8bit"),
    "ema_decay": Alias("ema"),
    "mixed_precision": Alias("precision", {"no": "fp32", False: "fp32"}),
    "center_crop": Alias("crop", switch="center"),
    "random_flip": Alias("flip", switch=0.5),
    "proportion_empty_prompts": Alias("caption_dropout"),
    "dataloader_num_workers": Alias("workers"),
    "checkpointing_steps": Alias("save_every"),
    "checkpoints_total_limit": Alias("keep"),
    "validation_prompt": Alias("validation_prompts"),
    "num_validation_images": Alias("samples"),
    "validation_steps": Alias("validate_every"),
    "enable_xformers_memory_efficient_attention": Alias("attention", switch="xformers"),
    # kohya's sd-scripts
    "network_dim": Alias("lora_rank"),
    "network_alpha": Alias("lora_alpha"),
    "network_weights": Alias("init"),
    "reg_data_dir": Alias("prior"),
    "unet_lr": Alias("learning_rate"),
    "optimizer_type": Alias("optimizer", {"AdamW": "adamw", "AdamW8bit": "adamw8bit", "SGD": "sgd"}),
    "max_train_epochs": Alias("epochs"),
    "enable_bucket": Alias("square", switch=False),
    "min_bucket_reso": Alias("min_side"),
    "max_bucket_reso": Alias("max_side"),
    "bucket_reso_steps": Alias("bucket_step"),
    "bucket_no_upscale": Alias("upscale", switch=False),
    "random_crop": Alias("crop", switch="random"),
    "flip_aug": Alias("flip", switch=0.5),
    "caption_dropout_rate": Alias("caption_dropout"),
    "shuffle_caption": Alias("shuffle_tags", switch=True),
    "keep_tokens": Alias("keep_tags"),
    "max_data_loader_n_workers": Alias("workers"),
    "validation_split": Alias("held_out"),
    "min_snr_gamma": Alias("snr_gamma"),
    "v_parameterization": Alias("prediction_type", switch="v_prediction"),
    "sample_prompts": Alias("prompts_file"),
    "sample_every_n_steps": Alias("validate_every"),
    "save_every_n_steps": Alias("save_every"),
    "save_precision": Alias("save_dtype", {"float": "fp32"}),
    "output_name": Alias("name"),
    "log_with": Alias("report_to"),
    "xformers": Alias("attention", switch="xformers"),
    "sdpa": Alias("attention", switch="sdpa"),
}
# What is known and not there: word -> (values that change nothing, what to do instead).
REFUSED: dict[str, tuple[tuple, str]] = {
    "image_column": ((None, "image"), "columns are found by their names: call it image or file_name"),
    "caption_column": ((None, "text", "caption", "prompt"), "columns are found by their names: call it text"),
    "dataset_config_name": ((None,), "name the set as owner/name, or give a folder"),
    "max_train_samples": ((None,), "give a folder with fewer pictures"),
    "use_ema": (ALWAYS, "an average of the weights is always kept; ema=0 makes it the weights themselves"),
    "with_prior_preservation": (NEVER, "give the pictures that are to be kept: --prior FOLDER"),
    "instance_prompt": ((None,), "captions come with the pictures: NAME.txt beside each, or metadata.jsonl"),
    "class_prompt": ((None,), "captions come with the pictures of --prior"),
    "validation_epochs": ((None,), "say it in steps: --validate-every N"),
    "scale_lr": (NEVER, "say the learning rate itself"),
    "lr_num_cycles": ((None, 1, "1"), "restarts are not supported"),
    "lr_power": ((None, 1, "1", 1.0, "1.0"), "polynomial schedules are not supported"),
    "adam_beta1": ((None,), "say both: betas=[0.9,0.99]"),
    "adam_beta2": ((None,), "say both: betas=[0.9,0.99]"),
    "allow_tf32": (NEVER, "is not supported: --precision bf16 is faster"),
    "push_to_hub": (NEVER, "nothing is ever uploaded"),
    "revision": ((None,), "write it behind the name: --model owner/name@revision"),
    "logging_dir": ((None,), "the log and its page lie in the run's folder"),
    "output_kohya_format": (ALWAYS, "both formats are always written"),
    "network_module": ((None, "networks.lora"), "LoRA and DoRA are supported: --train lora, --train dora"),
    "network_args": ((None,), "say --targets for the layers, --train dora for DoRA"),
    "network_train_unet_only": (ALWAYS, "the text encoder is trained with --text-encoder alone"),
    "network_train_text_encoder_only": (NEVER, "the U-Net is always trained"),
    "text_encoder_lr": ((None,), "there is one learning rate for all that is trained"),
    "cache_latents": (ALWAYS, "latents are cached unless --cache off"),
    "cache_latents_to_disk": (ALWAYS, "latents are cached unless --cache off"),
    "cache_text_encoder_outputs": (ALWAYS, "embeddings are cached unless --cache off"),
    "caption_extension": ((None, ".txt", ".caption"), "captions are found in .txt and .caption files by themselves"),
    "num_repeats": ((None, 1, "1"), "name the folder 10_name, or say --epochs"),
    "dataset_config": ((None,), "give the folder of pictures; kohya's 10_name folders are read"),
    "color_aug": (NEVER, "is not supported: it would break the cache"),
    "max_token_length": ((None, 75, "75"), "captions are read up to the text encoder's own length"),
    "clip_skip": ((None, 0, "0"), "the text encoder is used as the model has it"),
    "save_model_as": ((None, "safetensors"), "only safetensors is written"),
    "save_every_n_epochs": ((None,), "say it in steps: --save-every N"),
    "sample_every_n_epochs": ((None,), "say it in steps: --validate-every N"),
    "multires_noise_iterations": ((None, 0, "0"), "is not supported; --noise-offset is near"),
    "ip_noise_gamma": ((None, 0, "0"), "is not supported"),
    "min_timestep": ((None, 0, "0"), "all timesteps are trained; --timestep-shift moves their middle"),
    "max_timestep": ((None, 1000, "1000"), "all timesteps are trained; --timestep-shift moves their middle"),
}

OWN = ("stage", "data", "workers")  # fields of FinetuneSettings that are not words as they stand
_DATA = next(f.default_factory for f in dataclasses.fields(FinetuneSettings) if f.name == "data")
KEYS: dict[str, str] = {f.name: f.name for f in dataclasses.fields(FinetuneSettings) if f.name not in OWN}
KEYS |= {f.name: f"data.{f.name}" for f in dataclasses.fields(_DATA)}
NULLABLE = {f.name for f in dataclasses.fields(FinetuneSettings) if "None" in str(f.type)}
NULLABLE |= {f"data.{f.name}" for f in dataclasses.fields(_DATA) if "None" in str(f.type)}
KEYS |= {"data": "data.folder", "epochs": "epochs", "prompts_file": "validation_prompts"}


# The command line's options by group: word -> (what stands for its value; None: a switch, what it does).
OPTIONS: dict[str, dict[str, tuple[str | None, str]]] = {
    "what is trained": {
        "model": ("MODEL", "a diffusers folder, a .safetensors file or a hub id (the shipped model)"),
        "vae": ("PATH", "another VAE's folder or file"),
        "train": ("KIND", "lora, dora or full: the whole U-Net (lora)"),
        "lora_rank": ("N", "(16)"),
        "lora_alpha": ("X", "the update is scaled by alpha / rank (the rank)"),
        "targets": ("NAME,…", "attention, transformer, all-linear, all, or names of layers or their ends"),
        "text_encoder": (None, "train the text encoder too (CLIP alone)"),
        "init": ("FILE", "a LoRA or DoRA to go on from"),
    },
    "how long": {
        "steps": ("N", "optimizer steps (from the number of pictures)"),
        "epochs": ("X", "instead of steps: passes over the pictures"),
        "batch_size": ("N", "pictures that go through the network at once"),
        "accumulation": ("N", "of these batches make a step (1)"),
        "learning_rate": ("X", ""),
        "lr_schedule": ("NAME", "constant, linear, cosine"),
        "warmup": ("N", "steps in which the learning rate rises"),
        "optimizer": ("NAME", "adamw, adamw8bit, muon, sgd (adamw)"),
        "ema": ("X", "decay of the average of the weights that is kept; 0: the weights themselves"),
        "seed": ("N", "(0)"),
    },
    "the loss": {
        "prediction_type": ("NAME", "epsilon, v_prediction, sample, flow (what the model says)"),
        "snr_gamma": ("X", "min-SNR weighting; null: none (5)"),
        "noise_offset": ("X", "(0)"),
        "timesteps": ("NAME", "uniform or logit_normal (uniform)"),
        "timestep_shift": ("X", "above 1: more often at high noise (1)"),
        "zero_terminal_snr": (None, "rescale the schedule, in a run with --train full"),
        "prior": ("FOLDER", "captioned pictures of what must be kept, mixed into each step"),
        "prior_weight": ("X", "(1)"),
    },
    "the pictures": {
        "resolution": ("PIXELS", "(the model's)"),
        "captions": ("HOW", "auto, or names: of folders and files (auto)"),
        "split": ("NAME", "(train)"),
        "square": (None, "no buckets: every picture is cropped to a square"),
        "min_side": ("PIXELS", "of a bucket"),
        "max_side": ("PIXELS", "of a bucket"),
        "bucket_step": ("PIXELS", "(8, above 256 pixels 64)"),
        "crop": ("HOW", "center or random; random needs --cache off (center)"),
        "flip": ("X", "share of the pictures that is mirrored (0)"),
        "caption_dropout": ("X", "share that is trained without its caption (0.1)"),
        "shuffle_tags": (None, "the parts of a caption between commas in another order each time"),
        "keep_tags": ("N", "of these so many stay at the beginning (0)"),
        "held_out": ("X", "share of the pictures that is kept for validation (0.05)"),
        "max_bad": ("X", "share of the pictures that may be unusable (0.05)"),
        "allow_empty_captions": (None, "train on pictures without captions too"),
        "cache": ("FOLDER", "of latents and embeddings, or off (RUN/cache)"),
    },
    "progress": {
        "validate_every": ("N", "steps between two validation losses and sample grids"),
        "validation_prompts": (
            "TEXT",
            "of the sample grid; may be given several times (captions of held-out pictures)",
        ),
        "prompts_file": ("FILE", "the same from a file, one a line"),
        "samples": ("N", "pictures of the grid, where captions are drawn (8)"),
        "report_to": ("NAME,…", "tensorboard, wandb"),
    },
    "saving": {
        "save_every": ("N", "steps between two checkpoints"),
        "keep": ("N", "checkpoints (2)"),
        "export": ("WHICH", "last, or best: the lowest validation loss (last)"),
        "save_dtype": ("NAME", "fp32, bf16, fp16 (a LoRA's fp32, a model's bf16)"),
        "name": ("NAME", "of the file for A1111 and ComfyUI (the run's folder)"),
    },
    "the machine": {
        "device": ("NAME", "auto, cpu, cuda, mps"),
        "precision": ("NAME", "auto, bf16, fp16, fp32 (auto)"),
        "gradient_checkpointing": (None, "compute activations again instead of keeping them"),
        "attention": ("NAME", "of the U-Net: auto, sdpa, chunked, xformers"),
        "workers": ("N", "threads that read pictures where nothing is cached (1)"),
    },
}
SWITCHES = frozenset(word for group in OPTIONS.values() for word, (value, _) in group.items() if value is None)
TEXTS = ("model", "vae", "init", "prior", "captions", "split", "cache", "validation_prompts", "prompts_file", "name")
TEXTS += ("data",)  # values that are never read as numbers
PATHS = ("model", "vae", "init", "prior", "cache", "prompts_file", "name", "data", "folder")


def canonical(given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What was said, in anybody's words, as settings by their keys ("lora_rank", "data.resolution").

    Names of settings with dots and groups ("data": {…}) are taken as they are. Raises ConfigError for an unknown word
    (with the nearest), a refused one (with what to do), and one setting that is said in two ways.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for word, value in _flat(given).items():
        for key, own in _settled(str(word), value, where).items():
            if key in found and found[key] != own:
                raise ConfigError(f"{said[key]} and {word} are the same setting, and differ", where=where or None)
            found[key], said[key] = own, str(word)
    if "steps" in found and "epochs" in found:
        raise ConfigError("steps and epochs are both given", where=where or None, todo="say one of them")
    return found


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of data settings under dotted names."""
    flat: dict[str, Any] = {}
    for word, value in given.items():
        if word == "data" and isinstance(value, Mapping):
            flat |= {f"data.{name}": inner for name, inner in value.items()}
        else:
            flat[word] = value
    return flat


def _settled(word: str, value: Any, where: str) -> dict[str, Any]:
    """{} for a word that changes nothing, else {key: value}."""
    plain = word.replace("-", "_")
    if plain == "stage":
        if value != "finetune":
            raise ConfigError(f"is for the stage {value!r:.80}, not finetune", where=where or word)
        return {}
    if plain in REFUSED:
        neutral, sentence = REFUSED[plain]
        if not any(value is item or (type(value) is type(item) and value == item) for item in neutral):
            raise ConfigError(f"{word} is not taken here", where=where or None, todo=sentence)
        return {}
    if plain in ALIASES:
        alias = ALIASES[plain]
        if alias.switch is not None:
            if value in (False, None):
                return {}
            if value is not True:
                raise ConfigError(f"{word} is a switch, got {value!r:.80}", where=where or None)
            return _settled(alias.word, alias.switch, where)
        known = alias.values or {}
        return _settled(alias.word, known[value] if _hashable(value) and value in known else value, where)
    key = word if word.startswith("data.") else KEYS.get(plain)
    if key is None:
        todo = nearest(plain, [*KEYS, *ALIASES])
        raise ConfigError(f"unknown setting {word!r:.80}", where=where or None, todo=todo)
    if value is None and key not in NULLABLE:
        return {}  # as if it were not said
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str):
            _check_text(text, word, plain in PATHS or key.removeprefix("data.") in PATHS)
    if plain == "prompts_file":
        return {key: _prompts(value)}
    if plain in ("validation_prompts", "report_to", "targets") and isinstance(value, str):
        none = plain == "report_to" and value in ("none", "")
        parts = [value] if plain == "validation_prompts" else [part.strip() for part in value.split(",")]
        return {key: [] if none else parts}
    return {key: str(value) if key == "data.folder" and isinstance(value, Path) else value}


def _check_text(text: str, word: str, path: bool) -> None:
    """Raise ConfigError for what the operating system would choke on."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError("holds half a character (a lone surrogate)", where=word) from None
    if b"\0" in raw:
        raise ConfigError("holds a NUL character", where=word)
    if path and (len(raw) > 4000 or max(map(len, raw.split(b"/"))) > 255):
        raise ConfigError(f"is too long for a path: {text[:40]!r}…", where=word)


def _hashable(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _prompts(path: Any) -> list[str]:
    """The prompts of a text file: one a line, without kohya's options; # begins a comment."""
    try:
        text = Path(str(path)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ConfigError(f"cannot be read ({what})", where=f"prompts file {path}") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    prompts = [prompt for line in lines if (prompt := f" {line}".partition(" --")[0].strip())]
    if any(" --" in line for line in lines):
        say(f"{path}: the options in its lines (--w, --s, …) are not used: the grid is drawn as the settings say")
    if not prompts:
        raise ConfigError("holds no prompt", where=f"prompts file {path}", todo="write one a line")
    return prompts


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"data.resolution": 512} as {"data": {"resolution": 512}}."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        group, dot, name = key.partition(".")
        if dot:
            found.setdefault(group, {})[name] = value
        else:
            found[key] = value
    return found


def flattened(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nested`."""
    groups = {key for key in mapping if key == "data" and isinstance(mapping[key], Mapping)}
    found = {key: value for key, value in mapping.items() if key not in groups}
    return found | {f"{group}.{name}": value for group in groups for name, value in mapping[group].items()}


def setting_of(word: str) -> str:
    """The name of the setting that a word means, as `--allow-changed` needs it; an unknown one stays."""
    plain = word.replace("-", "_")
    plain = ALIASES[plain].word if plain in ALIASES else plain
    return "data" if plain.startswith("data.") or KEYS.get(plain, "").startswith("data.") else plain


def read_value(word: str, text: str) -> Any:
    """A value of the command line: text where the setting is one, else as YAML reads it. Raises ConfigError."""
    plain = word.replace("-", "_")
    plain = ALIASES[plain].word if plain in ALIASES else plain
    if plain in TEXTS or plain in REFUSED or plain == "data.folder":
        return text
    return config.override({}, [f"{word.replace('.', '_')}={text}"])[word.replace(".", "_")]


def assigned(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE as {key: value}. Raises ConfigError for what is none, and for a key that is given twice."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r:.80} is not KEY=VALUE", todo="write for example steps=1000")
        if key in found:
            raise ConfigError(f"{key} is given twice")
        found[key] = read_value(key, text)
    return found


def table() -> str:
    """The other tools' words with ours, as --help prints them."""
    rows: dict[str, list[str]] = {}
    for theirs, alias in ALIASES.items():
        value = f" {str(alias.switch).lower()}" if alias.switch is not None else ""
        rows.setdefault(f"{alias.word}{value}", []).append(theirs)
    width = max(len(ours) for ours in rows)
    return "\n".join(f"  {ours:<{width}}  {', '.join(theirs)}" for ours, theirs in rows.items())
