"""`ldm finetune` as a function: what was said, completed by presets, checked, and handed to the one trainer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import config as configs
from ldm.console import say
from ldm.errors import CheckpointError, ConfigError, DataError
from ldm.training.finetuning.options import assigned, canonical, flattened, nested, setting_of
from ldm.training.settings import FinetuneSettings, check_file_name

if TYPE_CHECKING:
    from ldm.training.data import Pictures

# Arguments by the words that diffusers' and kohya's scripts have for them, also in settings files.
PLACES = {"output_dir": "out", "resume_from_checkpoint": "resume"}
# What a settings file says of LoRA in a full run without meaning it: every run's settings.json has all of them.
USUAL = {"lora_rank": (None, 16), "lora_alpha": (None,), "targets": (None, ["attention"]), "init": (None,)}


def finetune(
    data: str | Path | None = None,
    out: str | Path | None = None,
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str | Path | bool | None = None,
    allow_changed: Sequence[str] = (),
    dry_run: bool = False,
    **words: Any,
) -> Path:
    """Fine-tune a model on captioned pictures; returns what `lora=` takes (the run's folder), or the model's folder.

    `data`: a folder of any layout, a .tar, a .parquet, a set on the hub. `words` are the settings, by our names or by
    those of diffusers' and kohya's scripts (`ldm finetune --help` has the table); what nobody says is chosen from the
    model, the number of pictures and the hardware, and printed as the command that repeats it. `config` is a settings
    file, `overrides` are KEY=VALUE strings. `resume`: "latest" (or True), "best" or a checkpoint's folder; settings
    that are not said are then those of that run, and `allow_changed` names those that may differ from it. `out` and
    `resume` may be said as `output_dir` and `resume_from_checkpoint`.

    Raises LdmError for all that can be said against the run before work begins (with `dry_run` it ends there),
    Interrupted after a signal (state saved), NumericsError when the loss stays non-finite, ProcessGone where torchrun
    started several processes for it and one of them is missing.
    """
    from ldm.training import run
    from ldm.training.distributed import processes
    from ldm.training.settings import as_dict

    overrides, allow_changed = _texts(overrides, "overrides"), _texts(allow_changed, "allow_changed")
    out, resume, words = _places(out, resume, config, words)
    if out is None:
        raise ConfigError("is needed: the run's folder (-o RUN)", where="out")
    with processes() as group:
        read: list[Pictures] = []  # by the first process; the others read them when they have its settings

        def settled() -> dict[str, Any]:
            found, pictures = prepared(data, out, model, config=config, overrides=overrides, resume=resume, **words)
            read.append(pictures)
            return as_dict(found)

        settings = configs.build(FinetuneSettings, group.on_first(settled))
        changed = [setting_of(word) for word in allow_changed]
        return run(settings, Path(out), resume, changed, dry_run, *read)


def _texts(value: Any, name: str) -> list[str]:
    """One text, or several."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple, set, frozenset)) or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"expected texts, got {value!r:.80}", where=name)
    return list(found)


def _places(
    out: Any, resume: Any, config: Any, words: Mapping[str, Any]
) -> tuple[str | None, str | None, dict[str, Any]]:
    """The run's folder and what is gone on from, as text, by whichever word they were given; and the other words."""
    if not isinstance(config, str | os.PathLike | None):
        raise ConfigError(f"expected a settings file, got {config!r:.80}", where="config")
    found, file = {"out": out, "resume": resume}, {} if config is None else configs.load(config)
    for word, name in PLACES.items():
        said = [value for value in (found[name], words.get(word)) if value is not None] or [file.get(word)]
        if len({str(value) for value in said}) > 1:
            raise ConfigError(f"{name} and {word} are the same, and differ")
        value = {True: "latest", False: None}[said[0]] if name == "resume" and type(said[0]) is bool else said[0]
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"expected a path, got {value!r:.80}", where=name)
        found[name] = None if value is None else str(value)
    return found["out"], found["resume"], {word: value for word, value in words.items() if word not in PLACES}


def prepared(
    data: str | Path | None,
    out: str | Path,
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    **words: Any,
) -> tuple[FinetuneSettings, Pictures]:
    """The settings of a run that is asked for as `finetune` has it, and its pictures, judged and counted.

    Says the command that repeats it. Raises ConfigError, DataError, ModelError, CheckpointError.
    """
    from ldm.training.finetuning.presets import command

    given = _given({"data": data, "model": model}, config, overrides, words)
    found, pictures = settle(given, _earlier(Path(out), resume), Path(out))
    settings = configs.build(FinetuneSettings, nested(found))
    say(f"with all settings said:\n  {command(found, out)}")
    return settings, pictures


def _given(
    named: Mapping[str, Any], config: str | Path | None, overrides: Sequence[str], words: Mapping[str, Any]
) -> dict[str, Any]:
    """All that was said, by the settings' keys; the file gives way to the rest. Raises ConfigError."""
    for name, value in named.items():
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"expected a path or a name, got {value!r:.80}", where=name)
    said = {name: str(value) for name, value in named.items() if value is not None}
    if twice := [word for word in words if word in said]:
        raise ConfigError(f"{twice[0]} is given twice")
    spoken = canonical({**said, **words})
    assignments = canonical(assigned(overrides))
    for key in spoken.keys() & assignments.keys():
        if spoken[key] != assignments[key]:
            raise ConfigError(f"{key} is given twice, and differs")
    given = {**spoken, **assignments}
    from_file = {} if config is None else _from_file(config, given)
    kind = {**from_file, **given}.get("train")
    lora = [word for word in USUAL if given.get(word) is not None or from_file.get(word) not in USUAL[word]]
    if kind == "full" and lora:
        raise ConfigError(f"{lora[0]} is for LoRA, and train=full trains all weights", todo="leave one of them out")
    return {**from_file, **given}


def _from_file(path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """A settings file's, less the steps or epochs that the other is said instead of."""
    found = canonical({k: v for k, v in configs.load(path).items() if k not in PLACES}, where=str(path))
    other = {"steps": "epochs", "epochs": "steps"}
    return {key: value for key, value in found.items() if other.get(key) not in given}


def _earlier(out: Path, resume: str | None) -> dict[str, Any]:
    """The settings of the run that goes on, by their keys; {} where none does. Raises CheckpointError."""
    from ldm.training.checkpoints import state

    if resume is None:
        return {}
    if resume in ("latest", "best"):
        return _settings_in(out / "settings.json")
    folder = Path(resume)
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint", where=folder, todo="give a folder checkpoints/step-… or 'latest'")
    return flattened(state.read_about(folder).get("settings", {}))


def _settings_in(path: Path) -> dict[str, Any]:
    import json

    try:
        return flattened(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError):
        return {}


def settle(given: Mapping[str, Any], earlier: Mapping[str, Any], out: Path) -> tuple[dict[str, Any], Pictures]:
    """Every setting that the run needs, by its key, and the pictures that were read on the way, its prior's too.

    `earlier` are the settings of the run that goes on, which stand where nothing else is said; a new run has presets.
    Raises ConfigError, ModelError, DataError.
    """
    from ldm.training.checks import check_finetune_place
    from ldm.training.data import FinetuneData, read_pictures
    from ldm.training.finetuning.presets import before_data, complete, in_steps, read_facts

    facts, said = None, {**earlier, **given}
    if not said.get("data.folder"):
        raise ConfigError("is needed: a folder of captioned pictures", where="data")
    if not earlier:
        model, init, device = (_text(given, name) for name in ("model", "init", "device"))
        facts = read_facts(model or "default", init, device or "auto")
        _check_init(given, facts.init)
        said = before_data(given, facts)
    data = configs.build(FinetuneData, nested(said).get("data", {}), "data")
    check_finetune_place(data, out)
    if said.get("train") != "full" and not said.get("name"):
        check_file_name(out.resolve().name, "out")
    pictures = read_pictures(data)
    if prior := _text(said, "prior"):
        pictures.prior = read_pictures(data.of_prior(prior))
    places = pictures.trained
    if not places:
        raise DataError("no picture is left to train on", where=data.folder)
    groups = list(Counter(pictures.items[place].bucket for place in places).values())
    found = complete(given, facts, groups) if facts is not None else in_steps(said, given, groups)
    return found, pictures


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"expected str, got {value!r:.80}", where=name)
    return value


def _check_init(given: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
    """A LoRA brings its kind, ranks and layers with it: to say others is a contradiction."""
    for name, value in (own or {}).items():
        asked = given.get(name)
        if asked is not None and asked != value:
            told = f"is {value} in the LoRA to go on from" if value != [] else "are those of the LoRA to go on from"
            raise ConfigError(f"{told}, not {asked}", where=name, todo="leave it out")
