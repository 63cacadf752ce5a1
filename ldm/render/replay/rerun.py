"""The entries of a run that draws images again, and what holds for all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ldm import console
from ldm.device import DTYPES
from ldm.pipeline.keywords import ALIASES
from ldm.render.prompts.entry import Prompts
from ldm.render.prompts.setting_table import BATCH, IMAGE, SETTINGS, of_scope
from ldm.render.replay.replay import OF_A_RUN, Replay, fitted_to, of_run, read_replays

SHOWN = 5  # notes on what is not repeated


def replayed(
    sources: str | os.PathLike | Sequence, changes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> Prompts:
    """The entries of images, manifests and folders to be drawn again.

    `settings` are render's, for what images do not say, such as the model where they do not name one at hand. Raises
    ConfigError as `read_replays` does.
    """
    given = {ALIASES.get(word, word): value for word, value in (settings or {}).items() if value is not None}
    model = given.get("model", "default")
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    replays = [
        fitted_to(replay, model, changes) for replay in read_replays(sources, changes)
    ]  # now: the manifest may be that of the folder that is written to
    notes = [f"{replay.entry.where}: {note}" for replay in replays for note in replay.notes]
    for note in notes[:SHOWN]:
        console.warn(note)
    if len(notes) > SHOWN:
        console.warn(f"{len(notes) - SHOWN} more things are not repeated")
    dtypes = {replay.source.get("dtype") for replay in replays}
    shared = {"dtype": dtypes.pop()} if len(dtypes) == 1 and dtypes <= set(DTYPES) else {}
    good = [replay for replay in replays if replay.entry.error is None]
    shared |= _of_one_run(good, given)
    _warn_of_unused([replay.entry.settings or {} for replay in good], given)
    entries = [replace(replay.entry, source=_comparable(replay.source)) for replay in replays]
    return Prompts(", ".join(map(str, sources[:3])), entries, shared)


def _of_one_run(replays: Sequence[Replay], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the images were drawn with that is the same for all of a run; warns where it is not, and not `given`."""
    found: dict[str, Any] = {}
    for name in OF_A_RUN:
        concerned = replays if name == "prediction_type" else [one for one in replays if one.entry.settings.get("lora")]
        values = {of_run(replay.source).get(name) for replay in concerned}
        if given.get(name) or values <= {None}:
            continue
        if name == "prediction_type" and not isinstance(given.get("model", ""), (str, os.PathLike)):
            continue  # the schedule of a loaded model is its own
        if len(values) == 1 or name == "allow_unapplied":
            found[name] = max(filter(None, values))
        else:
            option = f"--{name.replace('_', '-')} {max(filter(None, values))}"
            console.warn(f"some images were drawn with {option} and others without: draw them apart, those with it")
    return found


def _warn_of_unused(images: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> None:
    """In one line, which of the `given` settings are not used, since images have their own."""
    unused = {name: value for name, value in given.items() if any(_other(name, value, image) for image in images)}
    if not unused:
        return
    options = {name: SETTINGS[name].option or f"--{name.replace('_', '-')}" for name in unused}
    settable = [f"{options[name][2:]}={unused[name]}" for name in unused if SETTINGS[name].parser]
    hint = f"; --set {' --set '.join(settable)} changes all" if settable else ""
    console.warn(f"{', '.join(options.values())}: not used for images that tell their own{hint}")


def _other(name: str, value: Any, image: Mapping[str, Any]) -> bool:
    """Whether an image's settings have another value under this name."""
    if name not in image or (name == "model" and not isinstance(value, (str, os.PathLike))):
        return False
    value, own = (tuple(one) if isinstance(one, list) else one for one in (value, image[name]))
    paths = all(isinstance(one, (str, os.PathLike)) for one in (value, own))
    return name in of_scope(IMAGE, BATCH) and value != own and not (paths and _real(value) == _real(own))


def _real(path: str | os.PathLike) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _comparable(source: Mapping[str, Any]) -> dict[str, Any]:
    """`source` without a model that is given by its path alone (in manifests): the same one is used again."""
    return {name: value for name, value in source.items() if name != "model" or source.get("model_hash")}
