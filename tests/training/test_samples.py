"""Samples made in other processes: in order, and one line where such a process is gone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ldm.errors import DataError
from ldm.training import train
from ldm.training.checkpoints import state
from ldm.training.data.samples import lost_workers, stream


class Deadly:
    """Whose worker is killed at one of the samples, or that raises an error of its own there."""

    def __init__(self, at, error=None):
        self.at, self.error = at, error

    def __getitem__(self, index):
        if index == self.at:
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full((2, 2, 3), index, np.uint8), f"sample {index}"


def test_a_worker_that_is_killed_is_one_line_that_names_the_samples(one_thread):
    found = []
    with pytest.raises(DataError, match="a process that makes samples was killed") as error:
        for _, captions in stream(Deadly(9), 4, 2, 1):
            found += captions
    assert found == [f"sample {4 + i}" for i in range(len(found))]
    assert str(error.value).startswith(f"from sample {4 + len(found)} on: ") and "\n" not in str(error.value)
    assert error.value.exit_code == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_sample_s_own_stays_what_it_is(workers, one_thread):
    with pytest.raises(RuntimeError, match="a bug"):
        next(stream(Deadly(1, RuntimeError("a bug")), 0, 2, workers))


def test_one_that_is_killed_in_the_middle_of_anything_is_one_line_too(tmp_path, one_thread):
    batches, began = stream(Deadly(9), 4, 2, 1), time.monotonic()
    with (
        pytest.raises(DataError, match=r"was killed.*; there is no checkpoint yet, go on") as error,
        lost_workers(tmp_path),
    ):
        next(batches)
        while time.monotonic() < began + 30:
            time.sleep(0.1)
    assert error.value.exit_code == 5
    with pytest.raises(RuntimeError, match="a bug"), lost_workers(tmp_path):
        raise RuntimeError("a bug")


HOLDING = """
import sys
import numpy as np
from ldm.training.data.samples import stream
class Same:
    def __getitem__(self, index):
        return np.zeros((2, 2, 3), np.uint8), "the same"
held = stream(Same(), 0, 2, 1)
next(held)
sys.held = held
"""


def test_a_stream_that_is_still_held_does_not_keep_the_process_from_its_end(one_thread):
    done = subprocess.run([sys.executable, "-c", HOLDING], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_run_whose_worker_is_killed_goes_on(tmp_path, unet_settings, one_thread, monkeypatch):
    from ldm.training.stages.unet import UNetStage

    loss, words = UNetStage.loss, ["steps=6", "latent_pool=256", "workers=1"]

    def killing(self, batch, step, micro):
        if step == 4:
            for child in multiprocessing.active_children():
                child.kill()
        return loss(self, batch, step, micro)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="was killed") as error:
        patch.setattr(UNetStage, "loss", killing)
        train(unet_settings, tmp_path / "run", words)
    assert error.value.exit_code == 5 and state.checkpoints(tmp_path / "run")
    assert train(unet_settings, tmp_path / "run", words, resume="latest") == tmp_path / "run" / "model"
