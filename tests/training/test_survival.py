"""A run that is stopped, short of memory or disk, or better before its end: what is saved, marked, said and resumed."""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from ldm import files
from ldm.checkpoint.safety import write_manifest
from ldm.errors import CheckpointError, Interrupted, NumericsError, ResourceError
from ldm.training.checkpoints import reading, state
from tests.children import in_child, status_of
from tests.training.toy import Toy, train_toy


def ends(run):
    """Everything that a finished run says, but what tells the time."""
    names = [state.checkpoints(run)[-1] / "state.safetensors", run / "loss.jsonl", run / "scores.jsonl"]
    names += [run / "best.json", run / "model" / "weights.txt", *sorted((run / "samples").iterdir())]
    return {str(path.relative_to(run)): path.read_bytes() for path in names}


def steps_of(run):
    return [state.step_of(folder) for folder in state.checkpoints(run)]


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def whole(request, tmp_path_factory):
    """(lora, what a run that nobody disturbs ends with)."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train_toy(run, lora=request.param, accumulation=2)
    return request.param, ends(run)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_any_moment_and_resumed_is_what_it_would_have_been(number, whole, tmp_path):
    lora, expected = whole
    for moment in ((0, 0), (4, 1), (7, 0), (10, 1), None):

        def stop(step, micro, moment=moment):
            if (step, micro) == moment:
                os.kill(os.getpid(), number)

        child = in_child(lambda: train_toy(tmp_path / "run", "latest", lora=lora, inside=stop, accumulation=2) and 0)
        killed = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
        assert status_of(child) == (killed if moment else 0)
        if moment and number == signal.SIGTERM:
            assert steps_of(tmp_path / "run")[-1] == moment[0] + 1
    assert ends(tmp_path / "run") == expected


class SignalledAt(Toy):
    """SIGINT to its own process in one of its works at step 8."""

    where, done = "", 0

    def _maybe(self, where, step):
        if where == self.where and step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    def validate(self, ema, step):
        self._maybe("validate", step)
        return super().validate(ema, step)

    def sample_grid(self, ema):
        self._maybe("picture", self.done)
        return super().sample_grid(ema)

    def loss(self, batch, step, micro):
        self.done = step + 1
        return super().loss(batch, step, micro)

    def batches(self, first_step):
        for number, batch in enumerate(super().batches(first_step), first_step):
            self._maybe("batches", number)
            yield batch


@pytest.mark.parametrize("where", ["validate", "picture"])
def test_a_signal_need_not_wait_for_scores(where, whole, tmp_path):
    (lora, expected), before = whole, signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        kind = type("Signalled", (SignalledAt,), {"where": where})
        train_toy(tmp_path / "run", lora=lora, kind=kind, accumulation=2)
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert steps_of(tmp_path / "run")[-1] == 8
    assert json.loads((tmp_path / "run" / "scores.jsonl").read_text().splitlines()[-1])["step"] == 4
    train_toy(tmp_path / "run", "latest", lora=lora, accumulation=2)
    assert ends(tmp_path / "run") == expected


def test_a_signal_before_the_first_step_of_what_goes_on_waits_for_no_batch(tmp_path):
    train_toy(tmp_path / "run", steps=8, decay_from=1)
    kind = type("Signalled", (SignalledAt,), {"where": "batches"})
    with pytest.raises(Interrupted, match="at step 8, before another one"):
        train_toy(tmp_path / "run", "latest", kind=kind, decay_from=1)
    assert steps_of(tmp_path / "run") == [6, 8]


def test_how_long_a_signal_takes_is_said_once_at_the_start(tmp_path, capsys):
    train_toy(tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "ends the run, saved, within about" in line]
    assert len(lines) == 1 and "a checkpoint about" in lines[0]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


class Scored(Toy):
    """Whose validation loss is what a list says, step by 4 steps."""

    values = (9.0, 5.0, 3.0, 4.0, 4.0, 3.0)

    def validate(self, ema, step):
        return {"validation_loss": self.values[step // 4]}


def test_the_best_checkpoint_is_marked_kept_and_found(tmp_path, capsys):
    run = tmp_path / "run"
    train_toy(run, kind=Scored, steps=20, save_every=5)
    best = json.loads((run / "best.json").read_text())
    assert best == {"step": 8, "validation_loss": 3.0, "checkpoint": "checkpoints/step-00000008"}  # the first of equals
    assert steps_of(run) == [8, 15, 20]
    train_toy(run, "best", kind=Scored, steps=20, save_every=5)
    assert "step-00000020 is newer than what is resumed" in capsys.readouterr().err
    assert steps_of(run) == [8, 15, 20]
    (run / "best.json").unlink()
    with pytest.raises(CheckpointError, match="names no best checkpoint"):
        train_toy(run, "best", kind=Scored, steps=20, save_every=5)


def test_what_was_better_before_training_is_said(tmp_path, capsys):
    train_toy(tmp_path / "run", kind=type("Worse", (Scored,), {"values": (1.0, 2.0, 3.0, 4.0)}))
    assert "validation_loss was better before training (1) than at any checkpoint since" in capsys.readouterr().err


def test_the_best_model_can_be_what_is_made(tmp_path):
    """The settings of fine-tuning have `export`."""
    from ldm.training.loop.loop import fit
    from tests.training.conftest import threads
    from tests.training.toy import toy_settings

    with threads(1):
        at_8 = train_toy(tmp_path / "short", kind=Scored, steps=8, decay_from=1)
        settings = toy_settings(steps=20, decay_from=1)
        object.__setattr__(settings, "export", "best")
        made = fit(Scored(settings), settings, tmp_path / "run", None)
    assert (made / "weights.txt").read_text() == (at_8 / "weights.txt").read_text()


def test_out_of_memory_names_the_settings_to_change(tmp_path):
    def too_much(step, micro):
        torch.empty((1 if step < 5 else 1 << 50,))

    with pytest.raises(ResourceError) as error:
        train_toy(tmp_path / "run", inside=too_much)
    said = str(error.value)
    assert error.value.exit_code == 4 and "gradient_checkpointing=true" in said and "batch_size=4" in said
    assert steps_of(tmp_path / "run") == [3, 4]


def test_out_of_memory_in_validation_is_a_warning(tmp_path, capsys):
    class Greedy(Toy):
        def validate(self, ema, step):
            return super().validate(ema, step) if step != 8 else {"x": float(torch.empty(1 << 50).sum())}

    train_toy(tmp_path / "run", kind=Greedy)
    assert "step 8: out of memory in validation, so no scores" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert steps == [0, 4, 12]


def test_disk_space_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    def never(step, micro):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
    with pytest.raises(ResourceError, match=r"are needed, .* are free") as error:
        train_toy(tmp_path / "run", inside=never)
    assert error.value.exit_code == 4 and not (tmp_path / "run" / "checkpoints").exists()


def test_a_step_that_is_not_finite_names_its_samples(tmp_path, capsys):
    class Broken(Toy):
        def loss(self, batch, step, micro):
            return super().loss(batch, step, micro) * (float("nan") if step == 5 else 1)

    train_toy(tmp_path / "run", kind=Broken)
    said = capsys.readouterr().err
    assert "step 6: loss or gradient is not finite, nothing is applied (5-0, 5-1, 5-2, 5-3)" in said


def test_a_checkpoint_of_before_that_holds_frozen_tensors_too_goes_on(tmp_path):
    """As those were that held the whole network."""
    from safetensors.torch import save_file

    run = tmp_path / "run"
    train_toy(run, lora=True, decay_from=1)
    expected, folder = ends(run), run / "checkpoints" / "step-00000009"
    tensors = reading.read_tensors(folder)
    assert not any("layer" in name for name in tensors)
    for part in ("model", "ema"):
        tensors |= {f"{part}.0.layer.{name}": value.clone() for name, value in Toy(None).module[0].state_dict().items()}
    save_file(tensors, folder / "state.safetensors")
    write_manifest(folder)
    train_toy(run, str(folder), lora=True, decay_from=1)
    assert ends(run) == expected


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    train_toy(tmp_path / "run", steps=3)
    with pytest.raises(CheckpointError, match=r"tensors are not those of this network \(0.down, …\)"):
        train_toy(tmp_path / "run", "latest", ("steps",), lora=True, steps=4)


def test_a_full_disk_in_a_save_is_one_line_and_leaves_the_rest(tmp_path, capfd):
    def fill(step, micro):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    def child():
        try:
            return train_toy(tmp_path / "run", inside=fill, validate_every=100) and 0
        except ResourceError as error:
            print(error, file=sys.stderr)
            raise

    assert status_of(in_child(child)) == 4
    said = capfd.readouterr().err.splitlines()[-1]
    assert "step-00000006: cannot be written (File too large)" in said and "bytes are needed" in said
    assert "are free" in said and said.endswith("the last checkpoint is good (step-00000003), go on with --resume")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert reading.newest(tmp_path / "run").name == "step-00000003"


def broken_from(first, last=99):
    """A toy whose loss is not finite from one step to another."""

    class Broken(Toy):
        def loss(self, batch, step, micro):
            return super().loss(batch, step, micro) * (float("nan") if first <= step <= last else 1)

    return Broken


@pytest.mark.parametrize("every", [1, 2])
def test_bad_steps_do_not_drive_good_checkpoints_away(every, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    with pytest.raises(NumericsError, match=r"5 steps in a row \(10-0, 10-1, 10-2, 10-3\)") as error:
        train_toy(run, kind=broken_from(6), save_every=every, validate_every=100, decay_from=1)
    assert error.value.exit_code == 5 and "the last checkpoint is good (step-00000006)" in str(error.value)
    assert all(json.loads(line)["loss"] > 0 for line in (run / "loss.jsonl").read_text().splitlines())
    train_toy(whole, steps=6, save_every=every, validate_every=100, decay_from=1)
    assert steps_of(run) == steps_of(whole) == [6 - every, 6]
    for step in steps_of(run):
        name = f"checkpoints/step-{step:08d}/state.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_before_the_first_checkpoint_none_is_called_good(tmp_path):
    with pytest.raises(NumericsError, match="there is no checkpoint yet"):
        train_toy(tmp_path / "run", kind=broken_from(0), validate_every=100)


def test_no_model_is_made_of_a_last_step_that_was_bad(tmp_path):
    with pytest.raises(NumericsError, match=r"of the last step is not finite \(11-0, .*step-00000009") as error:
        train_toy(tmp_path / "run", kind=broken_from(11))
    assert error.value.exit_code == 5 and not (tmp_path / "run" / "model").exists()
    train_toy(tmp_path / "other", kind=broken_from(5, 8))
    assert steps_of(tmp_path / "other")[-1] == 12


def test_scores_that_are_not_finite_are_not_saved_over_good_ones(tmp_path):
    kind = type("Lost", (Scored,), {"values": (9.0, 5.0, float("nan"), float("inf"))})
    with pytest.raises(NumericsError, match="the validation loss is not finite, so no model is made") as error:
        train_toy(tmp_path / "run", kind=kind, save_every=2)
    assert error.value.exit_code == 5 and not (tmp_path / "run" / "model").exists()
    assert steps_of(tmp_path / "run") == [4, 6]


def test_pictures_that_are_not_finite_name_the_last_checkpoint(tmp_path):
    class Dark(Toy):
        def sample_grid(self, ema):
            if self.seen > 4:
                raise NumericsError("the VAE gave NaN or infinity in decoding", todo="try --dtype fp32")
            return super().sample_grid(ema)

        def validate(self, ema, step):
            self.seen = step
            return super().validate(ema, step)

    said = (
        r"run: step 8: in validation: the VAE gave .*; lower learning_rate; the last checkpoint is good \(step-00000006"
    )
    with pytest.raises(NumericsError, match=said) as error:
        train_toy(tmp_path / "run", kind=Dark)
    assert error.value.exit_code == 5


def test_weights_that_are_not_finite_stop_the_run_part_way(tmp_path):
    def spoil(step, micro):
        if step == 5:
            with torch.no_grad():
                toys[0].module[3].bias += float("inf")

    class Kept(Toy):
        def __init__(self, *given):
            super().__init__(*given)
            toys.append(self)

        def loss(self, batch, step, micro):
            super().loss(batch, step, micro)
            return sum(p.square().sum() for p in self.module[0].parameters())

    toys = []
    with pytest.raises(NumericsError, match=r"tensors are not finite .* \(step-00000003\)") as error:
        train_toy(tmp_path / "run", kind=Kept, inside=spoil, validate_every=100)
    assert error.value.exit_code == 5 and steps_of(tmp_path / "run") == [3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_as_what_it_is(number, code, tmp_path, capfd, monkeypatch):
    import ldm.cli.train as command
    from ldm.cli import main

    def twice(step, micro):
        if step == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(command, "run", lambda args: train_toy(tmp_path / "run", inside=twice) and 0)
    assert status_of(in_child(lambda: main(["train", "emoji/unet", "-o", "x"]))) == code
    assert capfd.readouterr().err.splitlines()[-1] == f"stopped ({'SIGTERM' if code == 143 else 'Ctrl-C'})"
    assert steps_of(tmp_path / "run") == [3, 4]


def test_a_checkpoint_that_cannot_be_removed_is_said_once(tmp_path, capsys, monkeypatch):
    remove = shutil.rmtree
    monkeypatch.setattr(state.shutil, "rmtree", lambda p, **kw: None if p.name == "step-00000003" else remove(p, **kw))
    train_toy(tmp_path / "run", validate_every=100)
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be removed" in line]
    assert len(said) == 1 and "step-00000003: cannot be removed" in said[0]
    assert steps_of(tmp_path / "run") == [3, 9, 12]


def test_speed_counts_the_samples_there_are(tmp_path):
    """Of data in buckets the last batches are small."""
    from ldm.training.distributed import RowShard
    from ldm.training.loop.step import prepare, take_step
    from tests.training.toy import toy_settings

    settings = toy_settings(accumulation=2)
    stage = Toy(settings)
    now = prepare(stage, settings, torch.device("cpu"))
    batches = list(itertools.islice(stage.batches(0), 2))
    assert take_step(stage, now, settings, iter(batches)).rows == 8
    batches[1].part = RowShard(1)
    assert take_step(stage, now, settings, iter(batches)).rows == 5


def test_versions_and_hashes_are_beside_the_settings(tmp_path):
    import ldm

    train_toy(tmp_path / "run", steps=1)
    found = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert found["ldm"] == ldm.__version__ and found["torch"] == torch.__version__ and found["inputs"] == {}
