"""`ldm.finetune`: arguments become settings, with presets for what is not given, and the trainer runs them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.console import say
from ldm.errors import ConfigError
from ldm.settings_files import load
from ldm.training.finetuning.options import flatten, parse_overrides, resolve_aliases, setting_name
from ldm.training.settings import FinetuneSettings
from ldm.training.settings.features import check_lora_only

if TYPE_CHECKING:
    from ldm.training.data import ImageSet

# The names that diffusers' and kohya's scripts have for `out` and `resume`, also in settings files.
PLACES = {"out": "output_dir", "resume": "resume_from_checkpoint"}


class Arguments(NamedTuple):
    """What a call of `finetune` asks for."""

    settings: dict[str, Any]  # those that are given, by their keys
    out: Path
    resume: str | None  # "latest", "best" or a checkpoint's folder


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
    **options: Any,
) -> Path:
    """Fine-tune a model on captioned images; returns what `lora=` takes (the run's folder), or the model's folder.

    `data`: a folder of any layout, a .tar, a .parquet, a set on the hub. `out`: the run's folder. `options` are
    settings, by our names or by those of diffusers' and kohya's scripts (`ldm finetune --help` has the table). Settings
    that are not given are chosen from the model, the number of images and the hardware, and printed as the command
    that repeats the run. `config` is a settings file, `overrides` are KEY=VALUE strings. `resume`: "latest" (or True),
    "best" or a checkpoint's folder; settings that are not given are then those of that run, and `allow_changed` names
    settings that may differ from it. `out` and `resume` may be given as `output_dir` and `resume_from_checkpoint`.

    Raises LdmError for everything that can be checked before work begins (with `dry_run` the run ends there),
    Interrupted after a signal (state saved), NumericsError when the loss stays non-finite, ProcessGone where torchrun
    started several processes for the run and one of them is missing.
    """
    from ldm.training.distributed import processes
    from ldm.training.run import run

    with processes() as group:
        changeable = [setting_name(option) for option in _texts(allow_changed, "allow_changed")]
        named = {"config": config, "overrides": overrides, "resume": resume}
        asked = group.on_all(lambda: read_arguments(data, out, model, **named, **options))
        settings, images = group.on_all(lambda: resolve_settings(asked))
        return run(settings, asked.out, asked.resume, changeable, dry_run, images)


def read_arguments(
    data: str | Path | None,
    out: str | Path | None,
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str | Path | bool | None = None,
    **options: Any,
) -> Arguments:
    """The arguments of `finetune`, by whichever names they are given. Raises ConfigError."""
    if not isinstance(config, str | os.PathLike | None):
        raise ConfigError(f"expected a settings file, got {config!r:.80}", where="config")
    file = {} if config is None else load(config)
    out = _place("out", out, options, file)
    resume = _place("resume", resume, options, file)
    if out is None:
        raise ConfigError("is needed: the run's folder (-o RUN)", where="out")
    for name, value in (("data", data), ("model", model)):
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"expected a path or a name, got {value!r:.80}", where=name)
        options |= {name: str(value)} if value is not None else {}
    given, assigned = resolve_aliases(options), resolve_aliases(parse_overrides(_texts(overrides, "overrides")))
    for key in given.keys() & assigned.keys():
        if given[key] != assigned[key]:
            raise ConfigError(f"{key} is given twice, and differs")
    given |= assigned
    from_file = resolve_aliases(file, where=str(config))
    both = {**from_file, **given}
    if both.get("train") == "full" or both.get("control") is not None:
        check_lora_only(given, from_file, "control" if both.get("control") is not None else "train=full")
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if other in given:
            from_file.pop(key, None)
    return Arguments({**from_file, **given}, Path(out), resume)


def _place(name: str, value: Any, options: dict[str, Any], file: dict[str, Any]) -> str | None:
    """`out` or `resume` by either of its names, which are taken out of the options and the file."""
    alias = PLACES[name]
    given, in_file = (value, options.pop(alias, None)), file.pop(alias, None)
    values = [value for value in given if value is not None] or [in_file]
    if len({str(value) for value in values}) > 1:
        raise ConfigError(f"{name} and {alias} are the same, and differ")
    value = {True: "latest", False: None}[values[0]] if name == "resume" and type(values[0]) is bool else values[0]
    if not isinstance(value, str | os.PathLike | None):
        raise ConfigError(f"expected a path, got {value!r:.80}", where=name)
    return None if value is None else str(value)


def _texts(value: Any, name: str) -> list[str]:
    """One text, or several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple, set, frozenset)) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"expected texts, got {value!r:.80}", where=name)
    return list(texts)


def _settings_before(asked: Arguments) -> dict[str, Any]:
    """The settings of the run that is resumed, by their keys; {} where there is none. Raises CheckpointError."""
    if asked.resume is None:
        return {}
    from ldm.training.checkpoints.reading import settings_of

    return flatten(settings_of(asked.out, asked.resume))


def resolve_settings(asked: Arguments) -> tuple[FinetuneSettings, ImageSet]:
    """The settings of the run, and its images, checked and counted; the prior's too.

    A resumed run keeps its settings where no others are given; a new one has presets. Prints the command that repeats
    the run. Raises ConfigError, DataError, ModelError, CheckpointError.
    """
    from ldm.training.data import read_training_images
    from ldm.training.data.conditions import control_kind, with_conditions
    from ldm.training.data.images import with_prior
    from ldm.training.finetuning import presets
    from ldm.training.finetuning.checks import check_export, check_run_folder

    plan = presets.make_plan(asked.settings, _settings_before(asked))
    data, settings = plan.data, plan.settings
    check_run_folder(data, asked.out, settings.get("train") not in ("full", "control") and not settings.get("name"))
    control = presets.text_of(settings, "control")
    if control is not None:
        control_kind(control)  # before images are read
    prior = presets.text_of(settings, "prior")
    images = read_training_images(data)
    images = with_prior(images, prior) if prior else images
    images = images if control is None else with_conditions(images, control)
    settings = plan.complete(images)
    built = plan.build(settings)
    check_export(built, images)
    say(f"the command with all settings:\n  {presets.command(settings, asked.out)}")
    return built, images
