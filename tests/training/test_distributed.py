"""Two processes on the loopback against one: gradients, weights, losses, samples, checkpoints, signals and failures."""

import itertools
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint.safety import verify_manifest
from ldm.errors import ConfigError, DataError, Interrupted, ProcessGone, ResourceError
from ldm.training.checkpoints import state
from ldm.training.distributed import RowShard, current, heartbeat, processes, rows_of
from ldm.training.distributed.alone import Single, whole
from ldm.training.distributed.checks import check_processes
from ldm.training.loop.step import prepare
from tests.training.finetune_cases import apart, last_tensors
from tests.training.processes import Shared, ends_of, start, together, train_shared
from tests.training.toy import toy_settings

CPU = torch.device("cpu")
SGD = {"optimizer": "sgd", "weight_decay": 0.0, "warmup": 0, "lr_schedule": "constant", "steps": 5, "clip": 1e9}
UNEVEN = {"batch_size": 3, "accumulation": 2}
WAYS = pytest.mark.parametrize(
    ("lora", "sharded"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["full", "lora", "fsdp", "fl"],
)


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "loss.jsonl").read_text().splitlines()]


def steps_of(run):
    return [state.step_of(folder) for folder in state.checkpoints(run)]


def test_rows_are_shared_without_repeat_or_loss():
    losses = torch.rand(7, dtype=torch.float64)
    for size in (1, 2, 5, 7):
        parts = [rows_of(size, range(rank, size, 3), 3) for rank in range(3)]
        assert sorted(row for part in parts for row in part.own) == list(range(size))
        means = [part.mean(part.of(losses[:size])) for part in parts]
        assert torch.allclose(sum(means) / 3, losses[:size].mean())
    assert RowShard(5).own == (0, 1, 2, 3, 4) and rows_of(5, (), 1) == RowShard(5)


def write_gradients(path, lora):
    """Of the first step, on however many processes there are."""
    with processes() as group:
        settings = toy_settings(**UNEVEN)
        stage = Shared(settings, lora)
        now = prepare(stage, settings, CPU, group)
        batches = stage.batches(0)
        for micro in range(2):
            with now.parallel.micro(last=micro == 1):
                now.parallel.loss(stage, next(batches), 0, micro).backward()
        found = {name: whole(p.grad) for name, p in state.trainable(now.module).items()}
        if group.first:
            save_file(found, path)


@WAYS
def test_gradients_are_those_of_one_process(lora, sharded, tmp_path):
    write_gradients(tmp_path / "one", lora)
    assert together(2, lambda rank: write_gradients(tmp_path / "two", lora), sharded) == [0, 0]
    assert apart(load_file(tmp_path / "two"), load_file(tmp_path / "one")) < 1e-5


@WAYS
def test_weights_and_checkpoint_are_those_of_one_process(lora, sharded, tmp_path):
    words = {"lora": lora, **SGD, **UNEVEN}
    train_shared(tmp_path / "one", **words)
    assert together(2, lambda rank: train_shared(tmp_path / "two", **words) and 0, sharded) == [0, 0]
    names = [sorted(p.relative_to(run) for p in run.rglob("*")) for run in (tmp_path / "one", tmp_path / "two")]
    assert names[0] == names[1]
    for part in ("model.", "ema."):
        assert apart(last_tensors(tmp_path / "two", part), last_tensors(tmp_path / "one", part)) < 1e-5
    before = dict(Shared(None, lora).module.named_parameters())
    moved = last_tensors(tmp_path / "one")
    assert max((value - before[name]).abs().max() for name, value in moved.items()) > 1e-3


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_thirty_steps_of_adamw_have_the_losses_of_one_process(sharded, tmp_path):
    words = {"steps": 30, "log_every": 1, "learning_rate": 0.01, "validate_every": 30, "save_every": 30}
    train_shared(tmp_path / "one", **words)
    assert together(2, lambda rank: train_shared(tmp_path / "two", **words) and 0, sharded) == [0, 0]
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == 30 and one[-1] < 0.8 * one[0]
    assert max(abs(a - b) / b for a, b in zip(two, one)) < 1e-4


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("first", [1, 2])
def test_a_run_of_some_processes_goes_on_with_others(first, sharded, tmp_path, capfd):
    words = {"lora": True, "learning_rate": 0.01}
    train_shared(tmp_path / "whole", **words)

    def half(world, run, resume=None, **more):
        if world == 1:
            return train_shared(run, resume, **words, **more)
        work = lambda rank: train_shared(run, resume, **words, **more) and 0  # noqa: E731
        assert together(2, work, sharded) == [0, 0]

    half(first, tmp_path / "run", steps=6, decay_from=1)
    half(3 - first, tmp_path / "run", "latest")
    assert f"processes {first} → {3 - first}" in capfd.readouterr().err
    for part in ("model.", "ema.", "optimizer."):
        found, expected = (last_tensors(tmp_path / name, part) for name in ("run", "whole"))
        assert apart(found, expected) < 1e-4
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    assert len(losses_of(tmp_path / "run")) == len(losses_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("victim", "sharded"),
    [(0, False), (1, False), (0, True), pytest.param(1, True, marks=pytest.mark.slow)],
    ids=["0-ddp", "1-ddp", "0-fsdp", "1-fsdp"],
)
def test_where_one_is_killed_the_others_end_with_its_number(victim, sharded, tmp_path):
    def die(step, micro):
        if step == 7 and current().rank == victim:
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    children = start(2, lambda rank: train_shared(tmp_path / "run", inside=die), sharded, tmp_path)
    assert ends_of(children) == ([-9, 5] if victim == 0 else [5, -9])
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 30
    said = (tmp_path / f"{1 - victim}.txt").read_text()
    told = f"error: process {victim} of 2 is gone; go on with --resume latest\n"
    assert said.endswith(told) and said.count("error") == 1
    assert steps_of(tmp_path / "run")[-1] == 6
    train_shared(tmp_path / "run", "latest")
    assert steps_of(tmp_path / "run")[-1] == 12


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_a_signal_to_one_stops_all_after_the_same_step(sharded, tmp_path):
    def hear(step, micro):
        if step == 4 and current().rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    children = start(2, lambda rank: train_shared(tmp_path / "run", inside=hear), sharded, tmp_path)
    assert ends_of(children) == [143, 143]
    assert steps_of(tmp_path / "run")[-1] == 5
    assert files_are_whole(tmp_path / "run")
    assert "stopped after step 5, all saved" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""


def files_are_whole(run):

    return all(verify_manifest(folder) for folder in state.checkpoints(run))


class Broken(Shared):
    """On the second process one thing goes wrong at step 7."""

    fault = "data"

    def batches(self, first_step):
        for number, batch in enumerate(super().batches(first_step), first_step):
            if number == 7 and current().rank == 1 and self.fault == "data":
                raise DataError("is no picture", where="7.png")
            yield batch

    def loss(self, batch, step, micro):
        found = super().loss(batch, step, micro)
        if step == 7 and current().rank == 1 and self.fault == "nan":
            return found * float("nan")
        if step == 7 and current().rank == 1 and self.fault == "memory":
            torch.empty(1 << 50)
        return found


def broken(fault):
    return type("Broken", (Broken,), {"fault": fault})


def test_a_picture_that_one_cannot_read_ends_all_with_all_saved(tmp_path):
    children = start(2, lambda rank: train_shared(tmp_path / "run", kind=broken("data")), log=tmp_path)
    assert ends_of(children) == [5, 5]
    assert steps_of(tmp_path / "run")[-1] == 7
    assert (tmp_path / "0.txt").read_text().endswith("error: 7.png: is no picture\n")
    assert (tmp_path / "1.txt").read_text() == ""


def test_what_is_not_finite_on_one_is_left_out_by_all_and_named(tmp_path):
    work = lambda rank: train_shared(tmp_path / "run", kind=broken("nan")) and 0  # noqa: E731
    assert together(2, work, log=tmp_path) == [0, 0]
    said = (tmp_path / "0.txt").read_text()
    assert "step 8: loss or gradient is not finite, nothing is applied (7-0, 7-2, 7-1, 7-3)" in said


def test_memory_that_one_lacks_is_told_by_all(tmp_path):
    children = start(2, lambda rank: train_shared(tmp_path / "run", kind=broken("memory")), log=tmp_path)
    assert ends_of(children) == [ProcessGone.exit_code, ResourceError.exit_code]
    assert "error: process 1 of 2: " in (tmp_path / "0.txt").read_text()
    for rank in (0, 1):
        assert "out of memory; set gradient_checkpointing=true" in (tmp_path / f"{rank}.txt").read_text()


def test_what_many_processes_cannot_do_is_refused(monkeypatch):
    def refused(told, **changes):
        with pytest.raises(ConfigError, match=told):
            check_processes(toy_settings(stage=changes.pop("stage", "unet"), **changes))

    check_processes(toy_settings(stage="text"))  # alone
    monkeypatch.setattr("ldm.training.distributed.checks.current", lambda: two)
    two = type("Two", (), {"world": 2, "rank": 1, "sharded": False})
    check_processes(toy_settings(stage="unet", optimizer="muon"))
    for stage in ("control", "distill"):
        check_processes(toy_settings(stage=stage))
    refused("stage: text compares the images of a batch", stage="text")
    refused("batch_size: 1 images are too few for 2 processes", batch_size=1)
    two.sharded = True
    check_processes(toy_settings(stage="finetune"))
    refused("optimizer: muon needs whole tensors", optimizer="muon")
    refused("optimizer: adamw8bit needs whole tensors", optimizer="adamw8bit")
    refused("precision: fp16 does not go with FSDP2", precision="fp16")
    refused("stage: autoencoder is small", stage="autoencoder")
    refused("stage: distill asks a teacher that is whole", stage="distill")


def test_an_error_of_the_first_process_is_that_of_all(tmp_path):
    def refuse():
        raise Interrupted(15, "stopped", where="here")

    def work(rank):
        with processes() as group:
            assert group.on_first(lambda: {"rank": group.rank}) == {"rank": 0}
            assert group.gathered([str(rank)]) == ["0", "1"]
            assert group.any_of([rank == 0, rank == 1, False]) == [True, True, False]
            group.on_first(refuse)

    assert ends_of(start(2, work, log=tmp_path)) == [143, 143]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["error: here: stopped\n", ""]


def test_processes_that_do_not_say_who_they_are_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE: is 2, but the processes do not find each other"), processes():
        pass


def test_a_process_that_waits_for_ever_ends_when_another_is_gone(tmp_path, monkeypatch):
    """As with NCCL, which tells nobody: the main thread hangs outside of every exchange."""
    monkeypatch.setattr(heartbeat, "HUNG", 2.0)
    monkeypatch.setattr(heartbeat, "LOOK", 1)

    def hang(rank):
        with processes() as group:
            group.on_all(lambda: None)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    began = time.monotonic()
    assert ends_of(start(2, hang, log=tmp_path)) == [5, -9] and time.monotonic() - began < 30
    assert (tmp_path / "0.txt").read_text() == "error: process 1 of 2 is gone; go on with --resume latest\n"


@pytest.mark.parametrize(
    ("uuids", "said"),
    [(["a", "b"], ""), (["a", "a"], "device: 2 processes have the same GPU: start one for each, not more")],
)
def test_each_process_has_a_gpu_of_its_own_whatever_its_number(uuids, said, monkeypatch):
    """SLURM binds one GPU to each process, which is number 0 to it."""
    from ldm.training.distributed import checks

    group = SimpleNamespace(gathered=lambda own: [own[0].rpartition(" ")[0] + f" {uuid}" for uuid in uuids])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    if not said:
        return checks._check_gpus(group)
    with pytest.raises(ConfigError) as caught:
        checks._check_gpus(group)
    assert str(caught.value) == said


@pytest.mark.parametrize(("visible", "local", "taken"), [(8, 3, 3), (1, 3, 0), (0, 3, None)])
def test_the_gpu_that_a_process_takes(visible, local, taken, monkeypatch):
    from ldm.training.distributed import group

    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(group, "_meet", lambda: (_ for _ in ()).throw(ValueError("enough")))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="enough"):
        group.Many()
    assert chosen == ([] if taken is None else [taken])


def test_fsdp_takes_a_model_to_its_device_layer_by_layer(monkeypatch):
    """The whole module is never moved: `fully_shard` moves what it shards."""
    stage = Shared(toy_settings())
    monkeypatch.setattr(stage.module, "to", lambda device: pytest.fail("the whole module was moved"))
    monkeypatch.setattr("ldm.training.loop.step.wrap_module", lambda group, stage, ema, device: Single())
    prepare(stage, toy_settings(), CPU, SimpleNamespace(world=2, sharded=True))


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_other_averages_are_scored_and_exported_as_by_one_process(sharded, tmp_path):
    words = {**SGD, "ema_lengths": (0.05, 0.2), "ema": 0.15}
    train_shared(tmp_path / "one", **words)
    assert together(2, lambda rank: train_shared(tmp_path / "two", **words) and 0, sharded) == [0, 0]
    one, two = (json.loads((tmp_path / run / "scores.jsonl").read_text().splitlines()[-1]) for run in ("one", "two"))
    scores = [one["validation_loss"], *(one[f"validation_loss ema {decay}"] for decay in (0.05, 0.2))]
    assert min(abs(a - b) for a, b in itertools.pairwise(scores)) > 1e-3
    assert two == pytest.approx(one, rel=1e-5)
    for folder in ("model", "model-ema-0.05", "model-ema-0.2"):
        found, expected = (json.loads((tmp_path / run / folder / "weights.txt").read_text()) for run in ("two", "one"))
        assert all(torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5) for a, b in zip(found, expected))
