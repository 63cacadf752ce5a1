"""The one training loop: every stage runs through it, and a killed run resumes to the same bits."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm import files, report
from ldm.console import StopRequest, progress, say
from ldm.device import fast_bf16, pick_device
from ldm.errors import CheckpointError, DataError, Interrupted, NumericsError, ResourceError
from ldm.training import state as states
from ldm.training.checks import fingerprints
from ldm.training.optimizers import make_optimizer
from ldm.training.settings import Settings, as_dict, changed
from ldm.training.state import TrainState

MAX_BAD_STEPS = 5  # steps in a row with a loss or gradient that is not finite


class Stage(Protocol):
    """What a stage adds to the loop. `batches` starts at any step and depends on nothing but (settings, step)."""

    module: nn.Module

    def batches(self, first_step: int) -> Iterator[Any]: ...  # accumulation × steps of them

    def loss(self, batch: Any, step: int, micro: int) -> Tensor: ...  # scalar fp32

    def validate(self, ema: nn.Module, step: int) -> dict[str, float]: ...

    def picture(self, ema: nn.Module): ...  # PIL image of samples, or None

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> None: ...


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, constant, then linear to `final_lr` of it at the last step."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    start = settings.decay_from * settings.steps
    left = 1.0 if step < start else 1 - (1 - settings.final_lr) * (step - start) / max(1.0, settings.steps - start)
    return settings.learning_rate * warm * left


def precision(settings: Settings, device: torch.device) -> AbstractContextManager:
    """Autocast to bf16 where it is asked for or faster, else nothing."""
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def fit(
    stage: Stage, settings: Settings, out: Path, checkpoint: Path | None, allow_changed: Sequence[str] = ()
) -> Path:
    """Train `stage` to `settings.steps` in the run folder `out` and return the folder of its model.

    `checkpoint` is what `to_resume` found. Raises Interrupted after a signal (state saved), NumericsError after five
    bad steps in a row (the last good checkpoint stays), CheckpointError where the models that the run reads are not
    those it began with, ResourceError out of memory, DataError (exit code 5, state saved) for a bad picture.
    """
    device = pick_device(settings.device)
    module = stage.module.to(device).train()
    ema = copy.deepcopy(module).eval().requires_grad_(False)
    state = TrainState(module, ema, make_optimizer(settings, module, device))
    inputs = {**fingerprints(settings), **getattr(stage, "inputs", {})}
    losses = _restore(state, checkpoint, settings, inputs, allow_changed) if checkpoint else []
    files.atomic_write(out / "settings.json", json.dumps(as_dict(settings), indent=1) + "\n")
    log = LossLog(out / "loss.jsonl", state.step, losses, inputs)
    try:
        if state.step == 0:
            _show(stage, state, out)
        with StopRequest() as stop:
            _steps(stage, state, settings, out, log, stop)
        scores = log.scores or _show(stage, state, out)
        stage.export(state.ema, out / "model", scores)
    except (MemoryError, torch.OutOfMemoryError) as error:
        todo = "lower batch_size (and raise accumulation); the last checkpoint is good"
        raise ResourceError(f"out of memory ({error})", where=f"{out}: step {state.step}", todo=todo) from None
    say(f"{out / 'model'}: {', '.join(f'{k} {v:.4g}' for k, v in scores.items())}")
    return out / "model"


def to_resume(settings: Settings, out: Path, resume: str | None, allow_changed: Sequence[str]) -> Path | None:
    """The checkpoint to go on from, its settings compared; `resume`: None, "latest" or a checkpoint's folder.

    Checkpoints of the run that are newer than the one named are set aside as `later-step-…`. Raises CheckpointError
    where the folder holds another run, the checkpoint is damaged or belongs to other settings.
    """
    for folder in (out, out / "checkpoints"):
        files.sweep(folder)
    if resume is None:
        if states.checkpoints(out):
            raise CheckpointError(
                "already holds a run", where=out, todo="go on with --resume, or choose another folder"
            )
        return None
    folder = states.newest(out) if resume == "latest" else Path(resume)
    if folder is None:
        say(f"{out}: nothing to resume, starting from the beginning")
        return None
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint", where=folder, todo="give a folder checkpoints/step-… or 'latest'")
    about = states.read_about(folder)
    differing = {k: v for k, v in changed(about["settings"], settings).items() if k not in allow_changed}
    if differing:
        told = "; ".join(f"{k}: {old} → {new}" for k, (old, new) in differing.items())
        raise CheckpointError(f"settings changed ({told})", where=folder, todo="allow each by --allow-changed NAME")
    for later in states.checkpoints(out):
        if later.parent.resolve() == folder.parent.resolve() and later.name > folder.name:
            later.rename(later.with_name(f"later-{later.name}"))
            say(f"{later.name} is newer than what is resumed: set aside as later-{later.name}")
    return folder


def _restore(
    state: TrainState, folder: Path, settings: Settings, inputs: dict[str, str], allow_changed: Sequence[str]
) -> list[float]:
    """Bring `state` to where the run was; returns the losses of the steps that no line of the log covers yet."""
    about = states.read_about(folder)
    for name, digest in about.get("inputs", {}).items():
        if inputs.get(name) != digest and name not in allow_changed:
            told = f"the {name} is not the one that this run began with"
            raise CheckpointError(told, where=folder, todo=f"put that one back, or --allow-changed {name}")
    tensors = states.read_tensors(folder)
    if about["settings"].get("optimizer", "adamw") != settings.optimizer:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
        say(f"{settings.optimizer} begins without moments")
    state.restore(tensors, about["step"])
    states.tell_differences(about["environment"], next(state.module.parameters()).device)
    say(f"resuming {folder.name}")
    return about["losses"]


def _steps(stage: Stage, state: TrainState, settings: Settings, out: Path, log: LossLog, stop: StopRequest) -> None:
    if state.step >= settings.steps:
        return
    batches, bad = stage.batches(state.step), 0
    samples, since = settings.batch_size * settings.accumulation * settings.log_every, time.monotonic()
    bar = progress(total=settings.steps, initial=state.step, desc=settings.stage, unit="step")
    with bar, closing(batches):  # else its workers, which hear no signal, outlive an error that nobody catches
        while state.step < settings.steps:
            loss = _guarded_step(stage, state, settings, batches, out, log)
            bad = 0 if math.isfinite(loss) else bad + 1
            if bad == MAX_BAD_STEPS:
                raise NumericsError(
                    f"loss or gradient is not finite, {bad} steps in a row",
                    where=f"{out}: step {state.step}",
                    todo="lower learning_rate or use precision=fp32; the last checkpoint is good",
                )
            log.add(state.step, loss, learning_rate(settings, state.step - 1), settings.log_every)
            bar.update()
            last = state.step == settings.steps
            if state.step % settings.log_every == 0:
                speed = f"loss {log.mean:.4f}, {samples / (time.monotonic() - since):.0f} samples/s"
                bar.set_postfix_str(speed)
                say(f"step {state.step}: {speed}", verbosity=1)
                since = time.monotonic()
            if state.step % settings.validate_every == 0 or last:
                log.scores = _show(stage, state, out)
                since = time.monotonic()
            stopped = stop.signal
            if state.step % settings.save_every == 0 or last or stopped:
                log.save(state, settings, out)
            if stopped and not last:
                told = f"stopped after step {state.step}, all saved"
                raise Interrupted(stopped, told, where=out, todo="go on with --resume latest")


def _guarded_step(
    stage: Stage, state: TrainState, settings: Settings, batches: Iterator[Any], out: Path, log: LossLog
) -> float:
    """A step; a picture that cannot be read stops the run part-way, with all before it saved."""
    try:
        return _step(stage, state, settings, batches)
    except DataError as error:
        if state.step:
            log.save(state, settings, out)
        error.exit_code = 5
        raise


def _step(stage: Stage, state: TrainState, settings: Settings, batches: Iterator[Any]) -> float:
    """One optimizer step; returns the loss, NaN where it or the gradient was not finite and nothing was applied."""
    device = next(state.module.parameters()).device
    rate = learning_rate(settings, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=device)
    for micro in range(settings.accumulation):
        with precision(settings, device):
            loss = stage.loss(next(batches), state.step, micro) / settings.accumulation
        loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(states.trainable(state.module).values(), settings.clip)
    good = bool(torch.isfinite(total + norm))
    if good:
        state.optimizer.step()
        update_ema(state.ema, state.module, min(settings.ema, (1 + state.step) / (10 + state.step)))
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return float(total) if good else math.nan


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, decay: float) -> None:
    """ema ← decay · ema + (1 − decay) · module, in place; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)
    for old, new in zip(ema.buffers(), module.buffers()):
        old.copy_(new)


def _show(stage: Stage, state: TrainState, out: Path) -> dict[str, float]:
    """Score and draw with the EMA weights; returns the scores and keeps them in `scores.jsonl`."""
    with torch.no_grad():
        scores = stage.validate(state.ema, state.step)
        image = stage.picture(state.ema)
    if image is not None:
        files.atomic_write(out / "samples" / f"step-{state.step:08d}.png", lambda path: image.save(path, format="PNG"))
    if (out / "loss.jsonl").exists():
        rows = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
        curve = report.line_plot({"loss": [(r["step"], r["loss"]) for r in rows]}, "step", "loss", log=True)
        files.atomic_write(out / "loss.svg", curve)
    lines = LossLog.until(out / "scores.jsonl", state.step - 1)
    line = json.dumps({"step": state.step, **scores})
    files.atomic_write(out / "scores.jsonl", "\n".join([*lines, line]) + "\n")
    say(f"step {state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    return scores


class LossLog:
    """`loss.jsonl`: one line {step, loss, lr} for the mean of every `log_every` steps, cut back on resume."""

    def __init__(self, path: Path, step: int, losses: list[float], inputs: dict[str, str] | None = None):
        self.path, self.mean, self.scores, self.inputs = path, math.nan, {}, inputs or {}
        self.values = losses  # of the steps since the last line
        if path.exists():
            files.atomic_write(path, "".join(f"{line}\n" for line in self.until(path, step)))

    @staticmethod
    def until(path: Path, step: int) -> list[str]:
        """The lines of a log up to and including `step`; a torn last line is dropped."""
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break
        return kept

    def add(self, step: int, loss: float, rate: float, every: int) -> None:
        if math.isfinite(loss):
            self.values.append(loss)
        if step % every == 0 and self.values:
            self.mean = sum(self.values) / len(self.values)
            self.values.clear()
            with files.disk_errors(self.path), self.path.open("a") as handle:
                handle.write(json.dumps({"step": step, "loss": self.mean, "lr": rate}) + "\n")

    def save(self, state: TrainState, settings: Settings, out: Path) -> None:
        """A checkpoint of the run, with what the log has not written yet and what the run reads."""
        extra = {"losses": self.values, "inputs": self.inputs}
        states.save(state, out, as_dict(settings), settings.keep, extra)
