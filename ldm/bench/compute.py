"""Networks compared at equal compute: what finished runs of `ldm train` score, against the FLOPs that they took.

The runs are the user's: trained from nothing on the same data, autoencoder and text encoder, and judged by the same
list. FLOPs are counted as `ldm train --dry-run` counts them (forward and backward pass), at the text's own length.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm import console
from ldm.checkpoint.describe import describe
from ldm.checkpoint.text_parts import find_text
from ldm.config import build, require
from ldm.errors import ConfigError
from ldm.files import atomic_write, require_writable
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.report import score_panels
from ldm.training.forecast import costs
from ldm.training.settings import UNetSettings

JUDGED = "judged"  # in a run: where `ldm evaluate RUN/model -o RUN/judged` wrote its scores
# What may differ between the runs: the network, what it is told of the noise level, the length and the rate.
FREE = {"model", "schedule", "steps", "learning_rate", "seed", "compile", "gradient_checkpointing"}
FREE |= {"save_every", "validate_every", "log_every", "keep", "workers", "device", "report_to"}
NOTE_WIDTH = 190  # letters


@dataclass(frozen=True)
class TrainedRun:
    """One finished run."""

    name: str  # of its folder
    network: str  # its kind and size: "U-Net, 9.14 M"
    parameters: int
    learning_rate: float
    seed: int
    steps: int
    samples: int  # that it was trained on
    flops: int  # to train on all of them, without the optimizer's
    first: int  # images of n whose object is the judge's first guess
    n: int
    match: float  # the judge's match, median
    x0_error: float  # of the validation at the run's end


@dataclass(frozen=True)
class ComputeComparison:
    """The runs, by network and FLOPs, and what they have in common."""

    settings: dict[str, Any]
    runs: tuple[TrainedRun, ...]

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {"bench": "compute", "settings": self.settings, "runs": [asdict(run) for run in self.runs]}

    def text(self) -> str:
        """The comparison as text: the settings and one line for each run."""
        lines = ["compute: " + ", ".join(f"{name} {value}" for name, value in self.settings.items())]
        width = max(len(run.name) for run in self.runs)
        heads = f"{'learning rate':>14} {'seed':>5} {'samples':>8} {'TFLOPs':>8}"
        heads += f" {'first guess':>12} {'match':>6} {'x0 error':>9}"
        lines.append(f"  {'':{width}}  {'':20} {heads}")
        for run in self.runs:
            cells = f"{run.learning_rate:>14g} {run.seed:>5} {run.samples:>8} {run.flops / 1e12:>8.1f}"
            cells += f" {f'{run.first}/{run.n}':>12} {run.match:>6.2f} {run.x0_error:>9.3f}"
            lines.append(f"  {run.name:{width}}  {run.network:20} {cells}")
        return "\n".join(lines)


def compute(runs: Sequence[str | Path] = (), out: str | Path | None = None) -> ComputeComparison:
    """Compare finished runs of the stage `unet` that were trained alike and judged by the same list.

    runs  their folders, each with `judged/scores.json` (`ldm evaluate RUN/model --prompts LIST -o RUN/judged`)
    out   a folder for compute.svg (each score against the FLOPs) and compute.json

    Raises ConfigError for no runs, for what is no such run, is not finished, not judged, or not comparable with the
    first, ResourceError where `out` cannot be written.
    """
    require(len(runs) > 0, "name finished runs: --runs RUN RUN …", "runs")
    if out is not None:
        require_writable(out)
    folders = [Path(run) for run in runs]
    settings = [_settings(folder) for folder in folders]
    judged = [_read(folder / JUDGED / "scores.json", _how_to_judge(folder)) for folder in folders]
    for folder, one, scores in zip(folders, settings, judged):
        _check_alike(folder, (one, scores), folders[0], (settings[0], judged[0]))
    errors = [_last_error(*each) for each in zip(folders, settings)]
    found = [_run(*each) for each in zip(folders, settings, judged, errors)]
    found.sort(key=lambda run: (run.network, run.flops, run.seed, run.learning_rate))
    told = {"list": judged[0]["list"], **judged[0]["settings"], "optimizer": settings[0].optimizer}
    told["batch size"] = settings[0].batch_size * settings[0].accumulation
    comparison = ComputeComparison(told, tuple(found))
    if out is not None:
        _write(Path(out), comparison)
    return comparison


def plot(comparison: ComputeComparison) -> str:
    """An SVG of each score against the FLOPs of the training; a mark is a run, a line goes through means of seeds."""
    scores = {"first guess": "first", "match, median": "match", "error of x0 (lower is better)": "x0_error"}
    networks = dict.fromkeys(run.network for run in comparison.runs)
    panels = {
        title.replace("first guess", f"first guess, of {comparison.runs[0].n}"): {
            network: [(run.flops / 1e12, getattr(run, name)) for run in comparison.runs if run.network == network]
            for network in networks
        }
        for title, name in scores.items()
    }
    told = ", ".join(f"{name} {value}" for name, value in comparison.settings.items())
    note = (
        f"Each mark is a run of its own from nothing, to the end of its learning rate; lines go through means. {told}."
    )
    note += " FLOPs: forward and backward pass of the network, without the optimizer's."
    return score_panels(panels, "TFLOPs of the training", textwrap.wrap(note, NOTE_WIDTH))


def _settings(folder: Path) -> UNetSettings:
    """The settings of a run of the stage `unet`. Raises ConfigError for any other folder."""
    found = _read(folder / "settings.json", "give the folder of a run of `ldm train`")
    if found.get("stage") != "unet":
        raise ConfigError(f"is a run of the stage {found.get('stage')!r:.40}, not of unet", where=folder)
    return build(UNetSettings, found, str(folder))


def _read(path: Path, hint: str) -> dict[str, Any]:
    """A JSON mapping. Raises ConfigError with what to do."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError("is missing or cannot be read", where=path, hint=hint) from None
    if not isinstance(found, dict):
        raise ConfigError("is no mapping", where=path, hint=hint)
    return found


def _how_to_judge(folder: Path) -> str:
    return f"run `ldm evaluate {folder / 'model'} --prompts LIST --no-controls -o {folder / JUDGED}`"


Trained = tuple[UNetSettings, Mapping[str, Any]]  # settings and the judge's report


def _check_alike(folder: Path, one: Trained, first: Path, other: Trained) -> None:
    """Raise ConfigError where a run was not trained and judged as the first one was."""
    free = FREE | ({"sample_steps"} if "num_inference_steps" in one[1].get("settings", {}) else set())
    differing = [name for name, value in vars(one[0]).items() if name not in free and value != vars(other[0])[name]]
    differing += [
        f"judged: {name}" for name in ("list", "n", "seed", "settings") if one[1].get(name) != other[1].get(name)
    ]
    if differing:
        raise ConfigError(f"differs from {first} in {', '.join(differing)}: not comparable", where=folder)


def _last_error(folder: Path, settings: UNetSettings) -> float:
    """The error of x0 at a run's end. Raises ConfigError where it is not finished."""
    path = folder / "scores.jsonl"
    scores = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    last = json.loads(scores[-1]) if scores else {}
    if last.get("step") != settings.steps:
        hint = f"go on with `ldm train … -o {folder} --resume`"
        raise ConfigError(f"is not finished: {settings.steps} steps are asked for", where=folder, hint=hint)
    return last["x0_error"]


def _run(folder: Path, settings: UNetSettings, judged: Mapping[str, Any], x0_error: float) -> TrainedRun:
    """What a run took and scored. Raises ModelError for its model."""
    config, tokens = describe(folder / "model").unet, find_text(str(folder / "model")).tokens
    parameters, flops, _ = costs(config, settings.gradient_checkpointing, tokens)
    samples = settings.steps * settings.batch_size * settings.accumulation
    kind = "transformer" if isinstance(config, MMDiTConfig) else "U-Net"
    return TrainedRun(
        name=folder.name,
        network=f"{kind}, {parameters / 1e6:.3g} M",
        parameters=parameters,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        steps=settings.steps,
        samples=samples,
        flops=flops * samples,
        first=judged["score"]["first"],
        n=judged["score"]["n"],
        match=judged["score"]["match_p50"],
        x0_error=x0_error,
    )


def _write(folder: Path, comparison: ComputeComparison) -> None:
    atomic_write(folder / "compute.svg", plot(comparison))
    text = json.dumps(comparison.as_json(), indent=1) + "\n"
    console.say(f"wrote {atomic_write(folder / 'compute.json', text)} and compute.svg")
