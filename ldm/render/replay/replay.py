"""From an image, or a manifest's line, back to the settings that drew it.

Our own `ldm` chunk and manifest.jsonl hold every resolved setting: with the same model, LoRAs, dtype, threads and torch
the image comes out to the bit. A1111's `parameters` text holds most (see a1111_settings). What cannot be
repeated is a note, one line each. `changes` (KEY=VALUE) replace settings of the source.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.checkpoint.describe import describe
from ldm.diffusion.guidance import Guidance
from ldm.errors import ConfigError, DataError, LdmError
from ldm.images import read_metadata
from ldm.pipeline.keywords import GUIDANCE_WORDS
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.sources import DIGESTS
from ldm.render.output.lines import DONE, FAILED, last_lines
from ldm.render.prompts.entry import Entry
from ldm.render.prompts.line_settings import parse_settings, with_own_controls
from ldm.render.prompts.setting_table import BATCH, IMAGE, SETTINGS, of_scope
from ldm.render.replay.a1111_settings import a1111_settings, fit_spacing, not_repeated
from ldm.render.replay.a1111_text import MAX_TEXT, read_infotext, read_infotexts
from ldm.render.replay.foreign_json import is_json, read_foreign
from ldm.render.replay.overrides import Changes

LEVELS = ("timesteps", "sigmas")  # in place of steps and spacing
# What our metadata holds beside settings: `differences` compares it.
UNSAID = {"compile": False, "backend": "torch"}  # recorded where they are something else
OF_THE_MACHINE = ("dtype", "device", "threads", "cpu_capability", "versions", "attention", "offload", *UNSAID)
OF_THE_MODEL = ("model", "model_hash", "commit", "schedule", "lora")
COMPARED = {**DIGESTS, "control_image": "control_sha256", "ip_adapter_image": "ip_adapter_image_sha256"}
COMPARED |= {"ip_adapter_mask": "ip_adapter_mask_sha256"}
NETWORKS = ("controlnet", "ip_adapter", "image_encoder")  # settings whose files have a hash
OF_A_RUN = ("prediction_type", "allow_unapplied", "dora_scaling")  # recorded where they were given
REMARKS = ("truncated", "unknown_words", "remarks", "named", "few_steps", "inexact", "job")


@dataclass(frozen=True, slots=True)
class Replay:
    """One image to draw again."""

    entry: Entry  # as a prompt file's, with an error where the source cannot be repeated
    notes: tuple[str, ...] = ()  # what is not repeated, one line each

    @property
    def source(self) -> Mapping[str, Any]:
        """What the source says of model, LoRAs and machine."""
        return self.entry.source or {}


def read_replays(sources: Sequence[str | os.PathLike], changes: Sequence[str] = ()) -> Iterator[Replay]:
    """What images (PNG, JPEG, WebP), manifests and folders of rendered images say, source by source.

    Raises ConfigError for a bad change and a source that does not exist; a source that cannot be repeated is an entry
    with an error, as a bad line of a prompt file is.
    """
    parsed = Changes.read(changes)
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise ConfigError("no such image or manifest", where=path)
    return (replay for path in paths for replay in _of_path(path, parsed))


def fitted_to(replay: Replay, model: Any, changes: Sequence[str] = ()) -> Replay:
    """The replay of a text with the spacing that the model can have, and a note where that is not the text's.

    One that `changes` ask for stays.
    """
    entry = replay.entry
    if entry.settings is None or "program" not in replay.source or "spacing" in Changes.read(changes).names:
        return replay
    try:
        schedule = describe(entry.settings.get("model", model)).schedule
    except LdmError:  # told where the model is loaded
        return replay
    settings, notes = fit_spacing(entry.settings, str(replay.source["program"]), schedule)
    return Replay(replace(entry, settings=settings), (*replay.notes, *notes))


def _of_path(path: Path, changes: Changes) -> Iterator[Replay]:
    if path.is_dir() or path.suffix.lower() == ".jsonl":
        yield from _of_manifest(path, changes)
    elif path.suffix.lower() == ".txt":
        yield from _of_text(path, changes)
    else:
        yield _replay(Entry(str(path), 1, path.name, None), lambda: _of_image(path, changes), changes)


def _of_manifest(path: Path, changes: Changes) -> Iterator[Replay]:
    """A replay for each job, finished or failed."""
    folder = path if path.is_dir() else path.parent
    number = 0
    for number, line in enumerate(last_lines(path), 1):
        entry = Entry(f"{path}, {line.get('path') or line['key']}", number, str(line.get("where")), None)

        def read(line=line) -> tuple[dict, list[str], dict]:
            settings = line.get("settings")
            if line["status"] not in (DONE, FAILED) or not isinstance(settings, Mapping):
                raise DataError("the line holds no settings")
            beside = {name: line[name] for name in OF_A_RUN if name in line}
            return _of_metadata({**settings, "seed": line.get("seed"), **beside}, folder, changes)

        yield _replay(entry, read, changes)
    if not number:
        hint = "give an image, or the manifest.jsonl of a rendered folder"
        raise ConfigError("holds no jobs", where=path, hint=hint)


def _of_text(path: Path, changes: Changes) -> Iterator[Replay]:
    """A replay for each image that a text beside images describes, as A1111 writes it."""
    with path.open("rb") as file:
        texts = read_infotexts(file.read(MAX_TEXT + 1))
    if not texts:
        hint = "a list of prompts is drawn by ldm render FILE, without --from"
        raise ConfigError("holds no settings as A1111 writes them beside images", where=path, hint=hint)
    for number, text in enumerate(texts, 1):
        where = f"{path}, text {number}" if len(texts) > 1 else str(path)
        entry = Entry(where, number, path.name, None)
        yield _replay(entry, lambda text=text: a1111_settings(read_infotext(text), path.parent, changes), changes)


def _replay(entry: Entry, read: Callable[[], tuple[dict, list[str], dict]], changes: Changes) -> Replay:
    """What `read` gives as a replay: (settings, notes, source) with the changes, or an entry with its error."""
    try:
        settings, notes, source = read()
        kept = {name: value for name, value in settings.items() if name not in changes.names}
        if changes.settings.get("sampler", settings.get("sampler")) != settings.get("sampler"):
            kept.pop("eta", None)  # of the other sampler
        settings = _consistent(with_own_controls({**kept, **changes.settings}), changes)
        if "prompt" not in settings:
            raise DataError("holds no prompt", hint="--set prompt=TEXT")
    except LdmError as error:
        return Replay(entry.refused(error))
    return Replay(replace(entry, text=settings["prompt"][:200], settings=settings, source=source), tuple(notes))


def _consistent(settings: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Less what means nothing beside the rest: a strength without an image, steps beside explicit noise levels."""
    if "image" not in settings:
        settings = {name: value for name, value in settings.items() if name not in ("strength", "mask_image")}
    if {"num_inference_steps", "spacing"} & changes.names:
        settings = {name: value for name, value in settings.items() if name not in LEVELS}
    if any(name in settings for name in LEVELS):
        settings = {name: value for name, value in settings.items() if name not in ("num_inference_steps", "spacing")}
    return settings


def _of_image(path: Path, changes: Changes) -> tuple[dict, list[str], dict]:
    metadata = read_metadata(path)
    if metadata.ldm:
        return _of_metadata(metadata.ldm, path.parent, changes)
    if is_json(metadata.parameters) or not metadata.parameters.strip():
        text = read_foreign({"parameters": metadata.parameters, **metadata.others})
        if text is not None:
            return a1111_settings(text, path.parent, changes)
    else:
        return a1111_settings(read_infotext(metadata.parameters), path.parent, changes)
    hint = "images of ldm, of A1111 and its relatives, and of programs that write settings as JSON can be repeated"
    raise DataError("holds nothing of how it was drawn", hint=hint)


# Ours


def _of_metadata(metadata: Mapping[str, Any], folder: Path, changes: Changes) -> tuple[dict, list[str], dict]:
    """(settings, notes, source) of an `ldm` chunk or of a manifest's settings; paths are looked up from `folder`."""
    settings, notes = {}, []
    compared = (*OF_THE_MODEL, *OF_THE_MACHINE, *COMPARED.values())
    source = {name: metadata[name] for name in (*compared, *NETWORKS, *OF_A_RUN) if metadata.get(name) is not None}
    no_settings = {*compared, *REMARKS, *OF_A_RUN} - {"lora"}
    for name, value in metadata.items():
        if name in changes.names or name in no_settings:
            continue
        if name == "negative_prompt" and value is None:
            settings[name] = None  # with XL other than ""
        elif name == "latents" and value is not None:
            raise DataError("was drawn from given latents, which are not in the file", where=name)
        elif name in COMPARED and "given" in _flat(value):
            hint = f"--set {name}=FILE"
            raise DataError("was drawn from an image that has no file", where=name, hint=hint)
        elif value is not None:
            _add(settings, notes, name, value, folder)
    if "model" in changes.names:
        source.pop("prediction_type", None)  # of another model
    if any(type(source.get(name, kind())) is not kind for name, kind in zip(OF_A_RUN, (str, bool, str))):
        raise DataError("the metadata is damaged", where=", ".join(OF_A_RUN))
    _check_guidance({**settings, **changes.settings})
    if "model" not in changes.names and (model := _model(metadata, folder)):
        settings["model"] = model
    return settings, notes, source


def _add(settings: dict[str, Any], notes: list[str], name: str, value: Any, folder: Path) -> None:
    """Add one recorded setting as it is, or by the parser of prompt lines where it has one; or a note."""
    if name not in of_scope(IMAGE, BATCH):
        notes.append(not_repeated(name, value, "this version does not know it"))
    elif SETTINGS[name].parser is None or name in DIGESTS or name in GUIDANCE_WORDS:
        settings[name] = tuple(value) if isinstance(value, list) else value
    else:
        try:
            settings |= parse_settings([(name, _as_in_lines(name, value))], folder)
        except ConfigError as error:
            raise ConfigError(error.what, where=error.where, hint=error.hint or f"--set {name}=…") from None


def _flat(value: Any) -> list[Any]:
    """The items of lists within lists."""
    return [item for one in value for item in _flat(one)] if isinstance(value, (list, tuple)) else [value]


def _as_in_lines(name: str, value: Any) -> Any:
    """A recorded value as prompt lines have it."""
    if name == "clip_skip" and isinstance(value, int):
        return value + 1  # lines count as A1111 does
    if name == "image_encoder" and isinstance(value, Mapping):
        return value.get("path")
    if name in ("controlnet", "ip_adapter") and isinstance(value, (list, tuple)):
        return [item.get("path") if isinstance(item, Mapping) else item for item in value]
    if name == "lora" and isinstance(value, (list, tuple)):
        return [_lora_in_lines(item) if isinstance(item, Mapping) else item for item in value]
    return value


def _lora_in_lines(item: Mapping[str, Any]) -> list[Any]:
    return [item.get("path"), item.get("weight"), *([item["text_weight"]] if "text_weight" in item else [])]


def _check_guidance(settings: Mapping[str, Any]) -> None:
    options = {name: settings[word] for word, name in GUIDANCE_WORDS.items() if word in settings}
    try:
        Guidance(scale=settings.get("guidance_scale", 1.0), **options)
    except (TypeError, ValueError) as error:
        raise DataError(f"the metadata is damaged ({error})", where="guidance") from None


def _model(metadata: Mapping[str, Any], folder: Path) -> str | None:
    """The recorded model as Pipeline takes it; None where only the name of a folder or file is known."""
    name, commit = metadata.get("model"), metadata.get("commit")
    if not isinstance(name, str) or not name:
        return None
    if name == "default":
        return name
    for path in (name, os.path.join(folder, name)):
        if os.path.exists(path):  # False for what cannot be a name
            return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(@[\w./-]+)?", name)
    return f"{hub[1]}@{commit}" if hub and isinstance(commit, str) else hub and hub[0]


# What will differ


def differences(source: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    """One line for each thing that will change the image, or may: the model first.

    `source` is a Replay's, `metadata` the new image's (or as much of it as is known before it is drawn).
    """
    lines = []
    was, now = str(source.get("model_hash", "")), str(metadata.get("model_hash", ""))
    if was and now and not now.lower().startswith(was.lower()):
        names = f"{source.get('model', 'a model')} (hash {was[:10]})", f"{metadata.get('model')} (hash {now[:10]})"
        older = ", or its hash is of the old kind" if len(was) == 8 else ""
        lines.append(f"the image was drawn by {names[0]}, this model is {names[1]}: it will differ{older}")
    elif source.get("model") and not was and source["model"] != metadata.get("model"):
        unknown = f"{source['model']!r:.80}, of unknown hash"
        lines.append(f"the image was drawn by {unknown}; this model is {metadata['model']}")
    lines += _other_loras(source.get("lora"), metadata.get("lora") or ())
    for word, name in COMPARED.items():
        if name in source and name in metadata and source[name] != metadata[name]:
            lines.append(f"{word} is another image than the one that was drawn from: it will differ")
    for name in NETWORKS:
        was, now = (_hashes(values.get(name)) for values in (source, metadata))
        if was and now and was != now:
            lines.append(f"{name} is another file than the one that was drawn with: it will differ")
    was, now = (values.get("schedule") for values in (source, metadata))
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        other = [name for name in was if name in now and was[name] != now[name] and not name.startswith("_")]
        lines += [f"{name} was {was[name]!r:.80}, is {now[name]!r:.80}: it will differ" for name in other]
    for name in OF_THE_MACHINE:
        old, new = (values.get(name, UNSAID.get(name)) for values in (source, metadata))
        if name == "versions":
            name = "torch"
            old, new = (value.get("torch") if isinstance(value, Mapping) else None for value in (old, new))
        if old is not None and new is not None and old != new:
            lines.append(f"{name} was {old}, is {new}: the last bits may differ")
    return lines


def _hashes(value: Any) -> list[str]:
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [str(one.get("hash")) for one in listed if isinstance(one, Mapping)]


def _other_loras(source: Any, loras: Sequence[Mapping[str, Any]]) -> list[str]:
    """LoRAs of the same name whose hash is another; `source` is our metadata's list, or A1111's `name: hash, …`."""
    if isinstance(source, str):
        pairs = [pair.rpartition(":") for pair in source.split(",")]
        hashes = {name.strip(): digest.strip() for name, _, digest in pairs}
    else:
        listed = source if isinstance(source, (list, tuple)) else ()
        hashes = {str(one.get("name")): str(one.get("short_hash", "")) for one in listed if isinstance(one, Mapping)}
    lines = []
    for lora in loras:
        was, now = hashes.get(str(lora.get("name")), ""), str(lora.get("short_hash", ""))
        if was and now and was[:10].lower() != now[:10].lower():
            lines.append(f"LoRA {lora.get('name')} had the hash {was[:10]}, this one has {now[:10]}: it will differ")
    return lines


def of_run(source: Mapping[str, Any]) -> dict[str, Any]:
    """Pipeline's keywords that an image was drawn with and that are no settings of a prompt line."""
    found = {name: source[name] for name in OF_A_RUN if name in source}
    loras = source.get("lora")
    listed = loras if isinstance(loras, (list, tuple)) else ()
    peft = any(isinstance(one, Mapping) and one.get("dora_scaling") == "peft" for one in listed)
    return found | ({"dora_scaling": "peft"} if peft else {})


def keywords(replay: Replay) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of Pipeline(...) and those of generate(...) that draw a replay; its name is left out.

    The dtype is that of the image, where it is known. Raises the error of a source that cannot be repeated.
    """
    if replay.entry.error is not None:
        raise replay.entry.error
    call = {name: value for name, value in replay.entry.settings.items() if name != "name"}
    pipeline = {name: call.pop(name) for name in inspect.signature(Pipeline).parameters if name in call}
    if "dtype" not in pipeline and isinstance(replay.source.get("dtype"), str):
        pipeline["dtype"] = replay.source["dtype"]
    pipeline |= of_run(replay.source)
    if isinstance(call.get("seed"), tuple):
        call["num_images"] = len(call["seed"])
    if "lora" in pipeline:
        pipeline["lora"] = list(pipeline["lora"])
    return pipeline, call
