"""`ldm.distill`: arguments become settings, with what the model decides of them, and the trainer runs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config import build, require
from ldm.errors import ConfigError, nearest
from ldm.settings_files import load, override
from ldm.training.settings import DistillSettings, packaged_configs, with_new_names


def distill(
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str | Path | None = None,
    allow_changed: Sequence[str] = (),
    dry_run: bool = False,
) -> Path:
    """Distil a model (the default one) and return what `lora=` takes, the run's folder, or the model's folder.

    `out`: the run's folder. `config` is a packaged name (emoji/guided, emoji/fast) or a settings file, `overrides` are
    KEY=VALUE strings of `DistillSettings`: `method=guidance` makes a student that does without guidance,
    `method=consistency` one that draws in `segments` steps, `method=trajectory` one that learns this from the model's
    own trajectories to images. Data are drawn scenes, `data=FOLDER`, or `prompts=FILE`, captions alone, of which the
    model draws images; `trajectory` takes the captions of any of these. The file that is written carries its settings.
    `resume`: "latest", "best" or a checkpoint's folder; what is not given is then as in that run.

    Raises LdmError for everything that can be checked before work begins (with `dry_run` the run ends there),
    Interrupted after a signal (state saved), NumericsError when the loss stays non-finite.
    """
    from ldm.training.command import open_images
    from ldm.training.distributed import processes
    from ldm.training.run import run

    if out is None:
        raise ConfigError("is needed: the run's folder (-o RUN)", where="out")
    with processes() as group:
        folder, again = Path(out), None if resume is None else str(resume)
        settings = group.on_all(lambda: read_distill(model, folder, config, overrides, again))
        images = group.on_all(lambda: open_images(settings, folder))
        return run(settings, folder, again, allow_changed, dry_run, images)


def read_distill(
    model: str | Path | None, out: Path, config: str | Path | None, overrides: Sequence[str], resume: str | None
) -> DistillSettings:
    """The settings of a run; those of the one that is resumed where no others are given. Raises ConfigError, …"""
    before: Mapping[str, Any] = {}
    if resume is not None:
        from ldm.training.checkpoints.reading import settings_of

        before = settings_of(out, resume)
    words = [f"data.folder={word[5:]}" if word.startswith("data=") else word for word in overrides]
    mapping = override({**before, **(_config(config) if config is not None else {})}, words)
    mapping = with_new_names({**mapping, **({} if model is None else {"model": str(model)}), "stage": "distill"})
    data = mapping.get("data") or {}
    if isinstance(data, Mapping) and "resolution" not in data:
        mapping["data"] = {**data, "resolution": _side(mapping)}
    return build(DistillSettings, mapping)


def _config(config: str | Path) -> dict[str, Any]:
    """A settings file, or one that is shipped."""
    path = Path(config)
    if not path.suffix:
        folder = packaged_configs()
        names = {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}
        names = {name: path for name, path in names.items() if load(path).get("stage") == "distill"}
        if str(config) not in names:
            raise ConfigError(f"no packaged settings {str(config)!r}", where="config", hint=nearest(str(config), names))
        path = names[str(config)]
    mapping = load(path)
    stage = mapping.get("stage", "distill")
    require(stage == "distill", f"these settings are of the stage {stage!r:.40}: use `ldm train`", str(config))
    return mapping


def _side(mapping: Mapping[str, Any]) -> int:
    """The pixels a side that the model was trained on."""
    from ldm.checkpoint.describe import describe

    model, vae = mapping.get("model", "default"), mapping.get("vae")
    for name, value in (("model", model), ("vae", vae)):
        if not isinstance(value, str | os.PathLike | None):
            raise ConfigError(f"expected a path or a name, got {value!r:.80}", where=name)
    return describe(model or "default", vae).usual_side
