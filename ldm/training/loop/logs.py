"""The logs of a run: loss.jsonl, scores.jsonl, and best.json, which names the best checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ldm import files

# The score that ranks checkpoints: the first of these that the stage has. +1: more is better.
BEST = {"validation_loss": -1, "psnr": 1, "text_to_image": 1}


class Best(NamedTuple):
    """The checkpoint with the best score."""

    step: int
    name: str  # of the score
    value: float


class RunLogs:
    """The logs of a run in `out`, cut back to `step`, where it begins or resumes."""

    def __init__(self, out: Path, step: int, losses: list[float]):
        self.out, self.values = out, losses  # of the steps since the last line
        for name in ("loss.jsonl", "scores.jsonl"):
            if (out / name).exists():
                files.atomic_write(out / name, "".join(f"{line}\n" for line in self._until(name, step)))

    def _until(self, name: str, step: int) -> list[str]:
        """The lines of a log up to and including `step`; a torn last line is dropped."""
        kept, path = [], self.out / name
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break
        return kept

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of "loss.jsonl", {step, loss, lr}, or of "scores.jsonl", {step, score: value, …}."""
        return [json.loads(line) for line in self._until(name, 1 << 62)]

    def add(self, step: int, loss: float, rate: float, every: int) -> dict[str, float] | None:
        """Add the loss of a step. At every `every`-th step write a line with the mean, and return it."""
        if math.isfinite(loss):
            self.values.append(loss)
        if step % every or not self.values:
            return None
        row = {"step": step, "loss": sum(self.values) / len(self.values), "lr": rate}
        self.values.clear()
        with files.disk_errors(self.out / "loss.jsonl"), (self.out / "loss.jsonl").open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        return row

    def score(self, step: int, scores: dict[str, float]) -> None:
        """Write the scores of a step; they replace earlier scores of the same step."""
        lines = [*self._until("scores.jsonl", step - 1), json.dumps({"step": step, **scores})]
        files.atomic_write(self.out / "scores.jsonl", "\n".join(lines) + "\n")

    def scores(self, step: int) -> dict[str, float]:
        """The scores of a step, {} if there are none."""
        found = [row for row in self.rows("scores.jsonl") if row["step"] == step]
        return {name: value for name, value in found[-1].items() if name != "step"} if found else {}

    def best(self, saved: Collection[int]) -> Best | None:
        """The best of the `saved` steps that have a score; the first of equals."""
        rows = [row for row in self.rows("scores.jsonl") if row["step"] in saved]
        name = next((name for name in BEST if any(name in row for row in rows)), None)
        found = [Best(row["step"], name, row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        return max(found, key=lambda best: BEST[best.name] * best.value, default=None)

    def mark(self, best: Best) -> None:
        """Name the best checkpoint in `best.json`."""
        folder = f"checkpoints/step-{best.step:08d}"
        files.atomic_write(
            self.out / "best.json", json.dumps({"step": best.step, best.name: best.value, "checkpoint": folder}) + "\n"
        )
