"""The training loop of every stage. A killed run resumes to the same bits."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ldm
from ldm import files
from ldm.console import StopRequest, progress, say, warn
from ldm.device import is_out_of_memory, keep_memory, pick_device
from ldm.errors import DataError, Interrupted, LdmError, NumericsError, ResourceError
from ldm.training.checkpoints import state as states
from ldm.training.checkpoints.reading import load_ema, read_tensors
from ldm.training.checkpoints.resume import restore, set_later_aside
from ldm.training.checkpoints.state import TrainState
from ldm.training.distributed import current
from ldm.training.distributed.checks import check_same_inputs
from ldm.training.loop.averages import averaged
from ldm.training.loop.compile_check import check_compiled
from ldm.training.loop.logs import BEST, Best, RunLogs
from ldm.training.loop.optimizers import checkpoint_bytes, learning_rate
from ldm.training.loop.stage import Stage
from ldm.training.loop.step import Outcome, drawing_precision, precision, prepare, take_step
from ldm.training.loop.trackers import Trackers
from ldm.training.parts import fingerprints
from ldm.training.reports.page import write_page
from ldm.training.settings import FinetuneSettings, Settings, as_dict

MAX_BAD_STEPS = 5  # steps in a row with a loss or gradient that is not finite


def fit(
    stage: Stage, settings: Settings, out: Path, checkpoint: Path | None, allow_changed: Sequence[str] = ()
) -> Path:
    """Train `stage` to `settings.steps` in the run folder `out` and return the folder of its model.

    `checkpoint` is the result of `to_resume`. Raises Interrupted after a signal (state saved), NumericsError after five
    bad steps in a row (the last good checkpoint stays), CheckpointError where the models that the run reads are not
    those it began with, ResourceError out of memory or, before the first step, where the disk has no room for its
    checkpoints, DataError (exit code 5, state saved) for a bad image, ProcessGone where another process is missing.
    """
    group = current()
    keep_memory()
    with _memory_named(settings, out):
        state = prepare(stage, settings, pick_device(settings.device), group)
        inputs = getattr(stage, "inputs", {})
        if not isinstance(settings, FinetuneSettings):  # whose stage has the hash of everything that it loaded
            inputs = {**fingerprints(settings), **inputs}
        if group.world > 1:
            check_same_inputs(inputs, out)
        losses: list[float] = []
        if checkpoint:
            losses = group.on_all(partial(restore, state, checkpoint, settings, inputs, allow_changed))
            group.on_first(partial(set_later_aside, out, checkpoint))
        run = group.on_all(lambda: _Run(stage, state, settings, out, losses, inputs))
        try:
            with run.stop:
                run.train()
            return run.export()
        except ResourceError as error:
            hint = "; ".join(filter(None, (error.hint, states.way_back(out))))
            raise ResourceError(error.what, where=error.where, hint=hint) from None
        except BaseException as error:
            with suppress(LdmError):
                run.tell(f"stopped: {str(error) or type(error).__name__}")
            raise
        finally:
            if run.trackers:
                run.trackers.finish()


@contextmanager
def _memory_named(settings: Settings, out: Path) -> Iterator[None]:
    """Turn out-of-memory errors into ResourceError that names the settings to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = f"{memory_hints(settings)}; {states.last_good(out)}"
        raise ResourceError("out of memory", where=out, hint=hint) from None


def memory_hints(settings: Settings) -> str:
    """Which settings to change when memory runs out."""
    found = [] if settings.gradient_checkpointing else ["set gradient_checkpointing=true"]
    if settings.batch_size > 1:
        found.append(f"lower batch_size={settings.batch_size} and raise accumulation={settings.accumulation}")
    return ", or ".join([*found, f"lower data.resolution={settings.data.resolution}"])


def ask_for_space(module: nn.Module, settings: Settings, out: Path) -> None:
    """Raise ResourceError unless the disk has room for the run's checkpoints.

    That is `keep`, the best one, and a new one before the oldest is removed, less those that exist already.
    """
    count = settings.keep + 2 - len(states.checkpoints(out))
    files.require_space(out, int(1.2 * max(1, count) * checkpoint_bytes(settings, module)))


class _Run:
    """A run in its folder: the steps, and the logs, scores and checkpoints that they write."""

    def __init__(
        self,
        stage: Stage,
        state: TrainState,
        settings: Settings,
        out: Path,
        losses: list[float],
        inputs: dict[str, str],
    ):
        self.stage, self.state, self.settings, self.out = stage, state, settings, out
        self.group, self.inputs, self.stop = state.parallel.group, inputs, StopRequest()
        self.group.listen(self.stop)
        self.scores: dict[str, float] = {}
        if self.group.first:
            ask_for_space(state.module, settings, out)
            files.atomic_write(out / "settings.json", json.dumps(as_dict(settings), indent=1) + "\n")
            versions = {"ldm": ldm.__version__, **states.environment(next(state.module.parameters()).device)}
            files.atomic_write(out / "versions.json", json.dumps({**versions, "inputs": inputs}, indent=1) + "\n")
            self.logs = RunLogs(out, state.step, losses)
            self.scores = self.logs.scores(state.step)
        report = self.group.first and settings.report_to
        self.trackers = Trackers(settings, out, state.step) if report else None
        self.clock: deque[float] = deque(maxlen=100)  # seconds of the last steps
        self.rows: deque[int] = deque(maxlen=100)  # their samples
        self.bad, self.samples = 0, []  # steps in a row that were not finite, up to the last one; its samples
        self.sound = True  # the last scores are numbers
        self.stuck: set[Path] = set()  # checkpoints that could not be removed

    @property
    def signal(self) -> int | None:
        """The signal that stops the run; with several processes, the one that all know of."""
        return self.group.signal(self.stop)

    def train(self) -> None:
        """Run to the last step, with scores, checkpoints and the page."""
        state, settings = self.state, self.settings
        if state.step in map(states.step_of, states.checkpoints(self.out)):
            self._tidy()  # it may have been killed right after that checkpoint
        if state.step >= settings.steps:
            return
        if self.group.from_first(state.step % settings.validate_every == 0 and not self.scores):
            self._show()
        batches = self.stage.batches(state.step)
        bar = progress(total=settings.steps, initial=state.step, desc=settings.stage, unit="step")
        with bar, closing(batches):  # else its workers, which hear no signal, outlive an error that nobody catches
            ready = self._begun(batches)
            while state.step < settings.steps:
                self._step(ready, bar)
                if self.bad == MAX_BAD_STEPS:
                    raise self._lost(f"loss or gradient is not finite, {self.bad} steps in a row{self._named()}")
                self._after_step()

    def _lost(self, what: str) -> LdmError:
        hint = f"lower learning_rate or use precision=fp32; {states.last_good(self.out)}"
        return self.group.of_all(NumericsError(what, where=f"{self.out}: step {self.state.step}", hint=hint))

    def _named(self) -> str:
        """The ids of the samples of the last bad step, if the batches have ids."""
        return f" ({', '.join(self.samples[:8])})" if self.samples else ""

    def _begun(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with the first one made. That may take minutes, so a signal may interrupt it."""
        first = []
        if not self.signal:
            device = next(self.state.module.parameters()).device
            with self.group.at_once(self.stop), precision(self.settings, device):  # as all the others are made
                first.append(self.group.agreed(partial(next, batches)))
        self.group.hear()
        if self.signal:
            raise self._stopped(f"at step {self.state.step}, before another one")
        what = self.stage, self.settings, first[0], self.state.step, self.state.parallel
        self.group.agreed(partial(check_compiled, *what))
        return chain(first, batches)

    def _step(self, batches: Iterator[Any], bar) -> None:
        """One step and its log line."""
        state, every, began = self.state, self.settings.log_every, time.monotonic()
        done = self._guarded(batches)
        self.clock.append(time.monotonic() - began)
        self.rows.append(done.rows)
        self.bad = self.bad + 1 if done.bad else 0
        if done.bad:
            self.samples = self.group.gathered(list(done.ids))
            warn(f"step {state.step}: loss or gradient is not finite, nothing is applied{self._named()}")
        if self.group.first:
            self._note(done, every, bar)

    def _note(self, done: Outcome, every: int, bar) -> None:
        """The log line of a step."""
        state = self.state
        row = self.logs.add(state.step, done.loss, learning_rate(self.settings, state.step - 1), every)
        bar.update()
        if row is not None:
            told = f"loss {row['loss']:.4f}, {self._speed():.3g} samples/s"
            bar.set_postfix_str(told)
            say(f"step {state.step}: {told}", verbosity=1)
            if self.trackers:
                self.trackers.log({"loss": row["loss"], "learning_rate": row["lr"]}, state.step)
        if len(self.clock) == 2:
            self._announce()

    def _guarded(self, batches: Iterator[Any]) -> Outcome:
        """One step. An image that cannot be read stops the run, after the steps before it are saved."""
        try:
            return take_step(self.stage, self.state, self.settings, batches)
        except DataError as error:
            if self.state.step and not self.bad:
                self._save()
            error.exit_code = 5
            raise

    def _speed(self) -> float:
        """Samples per second, without scores and checkpoints."""
        return sum(self.rows) / sum(self.clock)

    def _announce(self) -> None:
        """Print how long the run takes to stop after a signal: a step and a checkpoint."""
        size = checkpoint_bytes(self.settings, self.state.module)
        step, saving = self.clock[-1], states.saving_seconds(self.out, size)
        parts = f"a step takes {step:.2g} s, a checkpoint about {saving:.2g} s"
        say(f"Ctrl-C or SIGTERM ends the run, saved, within about {math.ceil(step + saving)} s ({parts})")

    def _after_step(self) -> None:
        """Take scores, save a checkpoint and answer a signal, where they are due.

        After a bad step, or with scores that are not finite, a checkpoint is saved for a signal only: it would replace
        a good one.
        """
        state, settings = self.state, self.settings
        last = state.step == settings.steps
        self.scores = {}
        due = last or state.step % settings.save_every == 0
        if last or state.step % settings.validate_every == 0:
            self._show()
            best = self._best() if self.scores else None
            due = self.group.from_first(due or (best is not None and best.step == state.step))
            self.sound = self.group.from_first(_sound(self.scores))
        if (due and self.sound and not self.bad) or self.signal:
            self._save()
        if self.signal:
            raise self._stopped(f"after step {state.step}, all saved")

    def _show(self) -> None:
        """Score and draw with the EMA weights, and write the page. A signal cuts it short.

        If memory runs out here, training goes on without scores. Raises NumericsError if an image is not finite.
        """
        if self.signal:
            return
        try:
            device = next(self.state.module.parameters()).device
            half = drawing_precision(self.settings, device)
            with nullcontext() if self.group.sharded else self.stop.at_once(), torch.no_grad(), half:
                self._score()
        except NumericsError as error:
            what, hint = f"in validation: {error.what}", f"lower learning_rate; {states.last_good(self.out)}"
            raise NumericsError(what, where=f"{self.out}: step {self.state.step}", hint=hint) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self.group.sharded:
                raise
            warn(f"step {self.state.step}: out of memory in validation, so no scores; {memory_hints(self.settings)}")
        self.state.parallel.settle()
        self.group.hear()

    def _score(self) -> None:
        step = self.state.step
        scores, image = self.stage.validate(self.state.ema, step), self.stage.sample_grid(self.state.ema)
        for decay in self.settings.ema_lengths:
            with averaged(self.state, decay) as ema:
                scores |= {f"{name} ema {decay:g}": v for name, v in self.stage.validate(ema, step).items()}
        if not self.group.first:
            return
        if image is not None:
            path = self.out / "samples" / f"step-{step:08d}.png"
            files.atomic_write(path, lambda path: image.save(path, format="PNG"))
            if self.trackers:
                self.trackers.image(image, step)
        self.logs.score(step, scores)
        self.scores = scores
        if self.trackers:
            self.trackers.log(scores, step)
        self.tell("running")
        if scores:
            say(f"step {step}: {_told(scores)}")

    def _best(self) -> Best | None:
        """The best checkpoint, this step counted as one."""
        return self.logs.best({self.state.step, *map(states.step_of, states.checkpoints(self.out))} - {0})

    def _save(self) -> None:
        """Save a checkpoint with unlogged losses and the digests of the inputs, and remove the oldest."""
        extra = {"losses": self.logs.values, "inputs": self.inputs} if self.group.first else {}
        states.save(self.state, self.out, as_dict(self.settings), extra)
        self._tidy()

    def _tidy(self) -> None:
        """Mark the best checkpoint and remove the oldest."""
        if not self.group.first:
            return
        best = self._best()
        if best is not None:
            self.logs.mark(best)
        for folder in states.rotate(self.out, self.settings.keep, best.step if best else None):
            if folder not in self.stuck:
                self.stuck.add(folder)
                warn(f"{folder}: cannot be removed, so it stays and takes its place on the disk")

    def _stopped(self, when: str) -> LdmError:
        error = Interrupted(self.signal, f"stopped {when}", where=self.out, hint="go on with --resume latest")
        return self.group.of_all(error)

    def tell(self, status: str) -> None:
        """Write the run's page."""
        if not self.group.first:
            return
        pace = (self._speed(), sum(self.clock) / len(self.clock)) if self.clock else None
        lines = list(getattr(self.stage, "lines", ()))
        write_page(self.logs, self.settings, self.state.step, status, self._best(), lines, pace)

    def export(self) -> Path:
        """Write the model of the EMA weights, or of the best checkpoint's, and return its folder.

        Raises NumericsError if the last step or its scores were not finite.
        """
        if self.group.from_first(not self.scores):
            self._show()
        step = self.group.on_first(self._best_step)
        if step is None and self.bad:
            raise self._lost(f"loss or gradient of the last step is not finite{self._named()}, so no model is made")
        if step is None and not self.group.from_first(_sound(self.scores)):
            raise self._lost("the validation loss is not finite, so no model is made")
        if step is not None:
            load_ema(self.state, read_tensors(self.out / "checkpoints" / f"step-{step:08d}"))
        for decay in self.settings.ema_lengths:
            with averaged(self.state, decay) as other:
                found = self.state.parallel.gathered(other)
                folder = self.out / f"model-ema-{decay:g}"
                self.group.on_first(partial(self._exported_average, found, folder))
        ema = self.state.parallel.gathered(self.state.ema)
        return Path(self.group.on_first(lambda: str(self._exported(ema, step))))

    def _exported_average(self, ema: nn.Module, folder: Path) -> str:
        return str(self.stage.export(ema, folder, self.scores))

    def _best_step(self) -> int | None:
        """The step of the best checkpoint if the model is made from it, else None."""
        best, before = self._best(), self.logs.scores(0)
        if best is not None and before.get(best.name, math.nan) * BEST[best.name] > best.value * BEST[best.name]:
            warn(f"{best.name} was better before training ({before[best.name]:.4g}) than at any checkpoint since")
        wanted = getattr(self.settings, "export", "last") == "best"
        if best is None and wanted:
            warn("no checkpoint has a score to be the best by: the model is that of the last step")
        if best is not None and wanted and best.step != self.state.step:
            say(f"the model is that of step {best.step}, the best")
            return best.step
        return None

    def _exported(self, ema: nn.Module, step: int | None) -> Path:
        """Write the stage's model with the scores of `step` (None: of the last step)."""
        scores = self.scores if step is None else self.logs.scores(step)
        made = self.stage.export(ema, self.out / "model", scores)
        self.tell("done")
        say(f"{made}: {_told(scores)}" if scores else f"{made}: done")
        return made


def _sound(scores: dict[str, float]) -> bool:
    """Whether the scores that rank checkpoints are finite."""
    return all(scores.get(name, 0) * sign > -math.inf for name, sign in BEST.items())  # NaN is not


def _told(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
