"""From a picture, or a manifest's line, back to the settings that drew it.

Our own `ldm` chunk and manifest.jsonl say every resolved setting: with the same model, LoRAs, dtype, threads and torch
the picture comes out to the bit. A1111's `parameters` text says most (see a1111_settings). What cannot be
repeated is a note, one line each. `changes` (KEY=VALUE) replace what a source says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError, DataError, LdmError
from ldm.pipeline.keywords import EDITING_WORDS, GUIDANCE_WORDS
from ldm.pipeline.sources import DIGESTS
from ldm.render.output.manifest import DONE, FAILED, last_lines
from ldm.render.prompts.files import Entry
from ldm.render.prompts.line_settings import FIELDS, check_words
from ldm.render.replay.a1111_settings import not_repeated, of_infotext
from ldm.render.replay.a1111_text import read_infotext
from ldm.render.replay.overrides import Changes

OF_PIPELINE = ("prompt", "negative_prompt", "model", "vae", "lora")
LEVELS = ("timesteps", "sigmas")  # in place of steps and spacing
# Words of Pipeline and generate that a prompt line has none for; they pass from a record of ours as they are.
OF_GENERATE = (*GUIDANCE_WORDS, *EDITING_WORDS, *LEVELS, "emphasis", "vae")
# What a record of ours says beside settings: `differences` looks at it.
OF_THE_MACHINE = ("dtype", "device", "threads", "cpu_capability", "versions", "attention", "offload")
OF_THE_MODEL = ("model", "model_hash", "commit", "schedule", "lora")
REMARKS = ("truncated", "unknown_words", "remarks", "job")


@dataclass(frozen=True, slots=True)
class Replay:
    """One picture to draw again."""

    entry: Entry  # as a prompt file's, with an error where the source cannot be repeated
    notes: tuple[str, ...] = ()  # what is not repeated, one line each
    told: Mapping[str, Any] = field(default_factory=dict)  # what the source says of model, LoRAs and machine


def read_replays(sources: Sequence[str | os.PathLike], changes: Sequence[str] = ()) -> Iterator[Replay]:
    """What pictures (PNG, JPEG, WebP), manifests and folders of rendered pictures say, source by source.

    Raises ConfigError for a bad change and a source that does not exist; a source that cannot be repeated is an entry
    with an error, as a bad line of a prompt file is.
    """
    given = Changes.read(changes)
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise ConfigError("no such picture or manifest", where=path)
    return (replay for path in paths for replay in _of_path(path, given))


def _of_path(path: Path, changes: Changes) -> Iterator[Replay]:
    if path.is_dir() or path.suffix.lower() == ".jsonl":
        yield from _of_manifest(path, changes)
    else:
        yield _replay(Entry(str(path), 1, path.name, None), lambda: _of_picture(path, changes), changes)


def _of_manifest(path: Path, changes: Changes) -> Iterator[Replay]:
    """A replay for each job, finished or failed."""
    folder = path if path.is_dir() else path.parent
    number = 0
    for number, record in enumerate(last_lines(path), 1):
        settings = record.get("settings")
        entry = Entry(f"{path}, {record.get('path') or record['key']}", number, str(record.get("where")), None)

        def read(record=record, settings=settings) -> tuple[dict, list[str], dict]:
            if record["status"] not in (DONE, FAILED) or not isinstance(settings, Mapping):
                raise DataError("the line holds no settings")
            return _of_record({**settings, "seed": record.get("seed")}, folder, changes)

        yield _replay(entry, read, changes)
    if not number:
        raise ConfigError(
            "holds no jobs", where=path, todo="give a picture, or the manifest.jsonl of a rendered folder"
        )


def _replay(entry: Entry, read: Callable[[], tuple[dict, list[str], dict]], changes: Changes) -> Replay:
    """What `read` gives as a replay: (settings, notes, told) with the changes, or an entry with its error."""
    try:
        settings, notes, told = read()
        kept = {name: value for name, value in settings.items() if name not in changes.names}
        settings = _consistent({**kept, **changes.settings}, changes)
        if "prompt" not in settings:
            raise DataError("tells no prompt", todo="--set prompt=TEXT")
    except LdmError as error:
        return Replay(entry.refused(error))
    return Replay(Entry(entry.where, entry.line, settings["prompt"][:200], settings), tuple(notes), told)


def _consistent(settings: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Less what means nothing beside the rest: a strength without a picture, steps beside explicit noise levels."""
    if "image" not in settings:
        settings = {name: value for name, value in settings.items() if name not in ("strength", "mask_image")}
    if {"num_inference_steps", "spacing"} & changes.names:
        settings = {name: value for name, value in settings.items() if name not in LEVELS}
    if any(name in settings for name in LEVELS):
        settings = {name: value for name, value in settings.items() if name not in ("num_inference_steps", "spacing")}
    return settings


def _of_picture(path: Path, changes: Changes) -> tuple[dict, list[str], dict]:
    from ldm.images import read_metadata

    metadata = read_metadata(path)
    if metadata.ldm:
        return _of_record(metadata.ldm, path.parent, changes)
    if metadata.parameters.strip():
        return of_infotext(read_infotext(metadata.parameters), path.parent, changes)
    todo = "only pictures of ldm, A1111 and programs that write its `parameters` text can be repeated"
    raise DataError("tells nothing of how it was drawn", todo=todo)


# Ours


def _of_record(record: Mapping[str, Any], base: Path, changes: Changes) -> tuple[dict, list[str], dict]:
    """(settings, notes, told) of an `ldm` chunk or of a manifest's settings."""
    settings, notes = {}, []
    known = (*OF_THE_MODEL, *OF_THE_MACHINE, *DIGESTS.values())
    told = {name: record[name] for name in known if record.get(name) is not None}
    passed = {*known, *REMARKS} - {"lora"}
    for name, value in record.items():
        if name in changes.names or name in passed:
            continue
        if name == "negative_prompt" and value is None:
            settings[name] = None  # with XL other than ""
        elif name == "latents" and value is not None:
            raise DataError("was drawn from given latents, which are not in the file", where=name)
        elif name in DIGESTS and value == "given":
            todo = f"--set {name}=FILE"
            raise DataError("was drawn from a picture that has no file", where=name, todo=todo)
        elif value is None:
            continue
        elif name in OF_GENERATE:
            settings[name] = tuple(value) if isinstance(value, list) else value
        elif name in FIELDS:
            settings |= check_words([(name, _as_word(name, value))], base)
        else:
            notes.append(not_repeated(name, value, "this version does not know it"))
    _check_guidance({**settings, **changes.settings})
    if "model" not in changes.names and (model := _model(record, base)):
        settings["model"] = model
    return settings, notes, told


def _as_word(name: str, value: Any) -> Any:
    """A recorded value as prompt lines say it."""
    if name == "clip_skip" and isinstance(value, int):
        return value + 1  # lines count as A1111 does
    if name == "lora" and isinstance(value, (list, tuple)):
        return [[item.get("path"), item.get("weight")] if isinstance(item, Mapping) else item for item in value]
    return value


def _check_guidance(settings: Mapping[str, Any]) -> None:
    from ldm.diffusion.guidance import Guidance

    words = {own: settings[word] for word, own in GUIDANCE_WORDS.items() if word in settings}
    try:
        Guidance(scale=settings.get("guidance_scale", 1.0), **words)
    except (TypeError, ValueError) as error:
        raise DataError(f"the record is damaged ({error})", where="guidance") from None


def _model(record: Mapping[str, Any], base: Path) -> str | None:
    """The recorded model as Pipeline takes it; None where only the name of a folder or file is told."""
    name, commit = record.get("model"), record.get("commit")
    if not isinstance(name, str) or not name:
        return None
    if name == "default":
        return name
    for path in (name, os.path.join(base, name)):
        if os.path.exists(path):  # False for what cannot be a name
            return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(@[\w./-]+)?", name)
    return f"{hub[1]}@{commit}" if hub and isinstance(commit, str) else hub and hub[0]


# What will differ


def differences(told: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """One line for each thing that will make, or may make, the picture another: the model first.

    `told` is a Replay's, `record` the new picture's record (or as much of one as is known before it is drawn).
    """
    lines = []
    was, now = str(told.get("model_hash", "")), str(record.get("model_hash", ""))
    if was and now and not now.lower().startswith(was.lower()):
        names = f"{told.get('model', 'a model')} (hash {was[:10]})", f"{record.get('model')} (hash {now[:10]})"
        older = ", or its hash is of the old kind" if len(was) == 8 else ""
        lines.append(f"the picture was drawn by {names[0]}, this model is {names[1]}: it will differ{older}")
    elif told.get("model") and not was and told["model"] != record.get("model"):
        lines.append(
            f"the picture was drawn by {told['model']!r:.80}, of unknown hash; this model is {record['model']}"
        )
    lines += _other_loras(told.get("lora"), record.get("lora") or ())
    for word, name in DIGESTS.items():
        if name in told and name in record and told[name] != record[name]:
            lines.append(f"{word} is another picture than the one that was drawn from: it will differ")
    for name in OF_THE_MACHINE:
        old, new = (source.get(name) for source in (told, record))
        if name == "versions":
            name = "torch"
            old, new = (source.get("torch") if isinstance(source, Mapping) else None for source in (old, new))
        if old is not None and new is not None and old != new:
            lines.append(f"{name} was {old}, is {new}: the last bits may differ")
    return lines


def _other_loras(told: Any, loras: Sequence[Mapping[str, Any]]) -> list[str]:
    """LoRAs under a told name whose hash is another; `told` is our record's list, or A1111's `name: hash, …`."""
    if isinstance(told, str):
        pairs = [pair.rpartition(":") for pair in told.split(",")]
        hashes = {name.strip(): digest.strip() for name, _, digest in pairs}
    else:
        known = told if isinstance(told, (list, tuple)) else ()
        hashes = {str(one.get("name")): str(one.get("short_hash", "")) for one in known if isinstance(one, Mapping)}
    lines = []
    for lora in loras:
        was, now = hashes.get(str(lora.get("name")), ""), str(lora.get("short_hash", ""))
        if was and now and was[:10].lower() != now[:10].lower():
            lines.append(f"LoRA {lora.get('name')} had the hash {was[:10]}, this one has {now[:10]}: it will differ")
    return lines


def keywords(replay: Replay) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of Pipeline(...) and those of generate(...) that draw a replay; its name is left out.

    The dtype is the one of the picture, where it is told. Raises the error of a source that cannot be repeated.
    """
    if replay.entry.error is not None:
        raise replay.entry.error
    settings = {name: value for name, value in replay.entry.settings.items() if name != "name"}
    own = {name: settings.pop(name) for name in OF_PIPELINE if name in settings}
    if isinstance(replay.told.get("dtype"), str):
        own["dtype"] = replay.told["dtype"]
    if isinstance(settings.get("seed"), tuple):
        settings["num_images"] = len(settings["seed"])
    if "lora" in own:
        own["lora"] = list(own["lora"])
    return own, settings
