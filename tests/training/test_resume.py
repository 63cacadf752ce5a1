"""A run that is killed, stopped or damaged goes on to the very bits of the run that was not."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from ldm.errors import CheckpointError, ConfigError, Interrupted, ResourceError
from ldm.training import train
from ldm.training.checkpoints import state
from tests.children import in_child, status_of
from tests.training.conftest import threads


def final_bytes(run):
    """Everything that a finished run says: last checkpoint, model and loss log."""
    last = state.checkpoints(run)[-1]
    files = [last / "state.safetensors", run / "loss.jsonl", run / "scores.jsonl"]
    files += sorted(p for p in (run / "model").rglob("*") if p.is_file())
    return {str(p.relative_to(run)): p.read_bytes() for p in files}


def wait_for_step(run, step, pid, limit=60):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done = state.checkpoints(run)
        if done and int(done[-1].name[5:]) >= step:
            return
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise AssertionError("the child ended before it was killed")
        time.sleep(0.005)
    raise AssertionError("no checkpoint in time")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, unet_mapping):
    """What a run that nobody disturbs ends with."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "unet.json").write_text(json.dumps(unet_mapping))
    with threads(1):
        train(folder / "unet.json", folder / "run")
    return final_bytes(folder / "run")


def test_killed_and_resumed_equals_uninterrupted(tmp_path, unet_settings, uninterrupted, one_thread):
    run = tmp_path / "killed"
    for step in (3, 6):
        pid = in_child(lambda: train(unet_settings, run, resume="latest"))
        wait_for_step(run, step, pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not (run / "model").exists()
    train(unet_settings, run, resume="latest")
    assert final_bytes(run) == uninterrupted
    assert len(state.checkpoints(run)) == 2  # the newest two are kept


def test_stopped_by_a_signal_to_its_whole_group_between_two_saves(
    tmp_path, unet_settings, uninterrupted, one_thread, monkeypatch
):
    """As a terminal's Ctrl-C and a job scheduler's SIGTERM do it: the workers get the signal too."""
    from ldm.training.stages.unet import UNetStage

    run, loss = tmp_path / "stopped", UNetStage.loss

    def interrupting(self, batch, step, micro):
        if (step, micro) == (4, 1):
            os.killpg(os.getpid(), signal.SIGTERM)
        return loss(self, batch, step, micro)

    def child():
        os.setsid()
        try:
            train(unet_settings, run)
        except Interrupted as stopped:  # its traceback holds the whole run: no worker may hang on that
            end = time.monotonic() + 10  # which a worker has on a busy machine
            while multiprocessing.active_children() and time.monotonic() < end:
                time.sleep(0.05)
            os._exit(99 if multiprocessing.active_children() else stopped.exit_code)

    with monkeypatch.context() as patch:
        patch.setattr(UNetStage, "loss", interrupting)
        pid = in_child(child)
        assert status_of(pid) == 143
    assert [p.name for p in state.checkpoints(run)] == ["step-00000003", "step-00000005"]
    train(unet_settings, run, resume="latest")
    assert final_bytes(run) == uninterrupted


def test_changed_settings_are_named(tmp_path, unet_settings, one_thread):
    run = tmp_path / "run"
    train(unet_settings, run, ["steps=3"])
    with pytest.raises(CheckpointError, match=r"batch_size: 4 → 8; seed: 0 → 1.*--allow-changed"):
        train(unet_settings, run, ["steps=6", "batch_size=8", "seed=1"], resume="latest")
    train(unet_settings, run, ["steps=4", "batch_size=8"], resume="latest", allow_changed=["batch_size"])
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(unet_settings, run)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(unet_settings, run, resume=str(run / "checkpoints" / "step-99"))


def test_one_bad_step_changes_nothing_but_the_count(tmp_path, unet_settings, one_thread):
    """A step whose loss is not finite leaves weights, EMA and optimizer as they were."""
    import torch

    from ldm.training.loop.step import take_step
    from ldm.training.settings import read_settings

    class Stage:
        factor = 1.0

        def loss(self, batch, step, micro):
            return (module.weight * batch).sum() * self.factor

    module, stage = torch.nn.Linear(2, 2), Stage()
    ema = torch.nn.Linear(2, 2)
    now = state.TrainState(module, ema, torch.optim.AdamW(module.parameters(), lr=0.1))
    settings = read_settings(unet_settings, ["accumulation=1"])
    take_step(stage, now, settings, iter([torch.ones(2)]))
    before = {k: v.clone() for k, v in now.tensors().items()}
    stage.factor = float("inf")
    take_step(stage, now, settings, iter([torch.ones(2)]))
    assert now.step == 2
    assert all(torch.equal(v, before[k]) for k, v in now.tensors().items())


def test_a_second_run_on_the_same_folder_is_refused(tmp_path, unet_settings):
    from ldm.files import Lock

    with Lock(tmp_path / "run"), pytest.raises(ResourceError, match=f"in use by process {os.getpid()}"):
        train(unet_settings, tmp_path / "run")


def test_bad_settings_are_refused_before_any_work(tmp_path, unet_settings):
    for overrides, told in (
        (["learing_rate=1"], "did you mean 'learning_rate'"),
        (["batch_size=0"], "batch_size: must be at least 1"),
        (["learning_rate=.nan"], "not a finite number"),
        (["latent_pool=100"], "multiple of 256"),
        (["vae="], "vae: is needed: the run of"),
        (["text="], "text: is needed: the run of"),
        (["validation=0"], "validation: must be at least 1"),
        (["stage=unnet"], "did you mean 'unet'"),
        (["timesteps=logitnormal"], "did you mean 'logit_normal'"),
        (["nonsense"], "not KEY=VALUE"),
    ):
        with pytest.raises(ConfigError, match=told):
            train(unet_settings, tmp_path / "run", overrides)
    with pytest.raises(ConfigError, match=r"did you mean 'emoji/unet'"):
        train("emoji/unett", tmp_path / "run")
    assert not (tmp_path / "run").exists()
