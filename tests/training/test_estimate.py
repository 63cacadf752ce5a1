"""What an estimate says of a run, and that nothing is left of it."""

import pytest
import torch

from ldm.files import format_bytes
from ldm.training.checkpoints import reading, state
from ldm.training.loop.estimate import estimate
from ldm.training.loop.step import prepare, take_step
from tests.training.toy import Toy, toy_settings, train_toy


def snapshot(stage):
    return {name: value.clone() for name, value in stage.module.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True])
def test_nothing_is_changed_by_trying(lora):
    settings = toy_settings(accumulation=2)
    stage = Toy(settings, lora)
    stage.module.eval()
    before = snapshot(stage)
    estimate(stage, settings)
    assert all(torch.equal(value, before[name]) for name, value in stage.module.state_dict().items())
    assert all(p.grad is None for p in stage.module.parameters()) and not stage.module.training


def test_what_a_checkpoint_takes_is_what_it_then_takes(tmp_path):
    for optimizer in ("adamw", "muon", "sgd"):
        settings = toy_settings(optimizer=optimizer)
        said = estimate(Toy(settings), settings).checkpoint_bytes
        train_toy(tmp_path / optimizer, optimizer=optimizer, steps=3)
        tensors = reading.read_tensors(state.checkpoints(tmp_path / optimizer)[-1])
        counts = sum(value.nbytes for name, value in tensors.items() if name.endswith(".step"))
        assert said == sum(value.nbytes for value in tensors.values()) - counts


class Wide(Toy):
    """Some million weights, and 64 MB that a step needs for a while."""

    def __init__(self, settings):
        super().__init__(settings)
        self.module = torch.nn.Linear(6, 1 << 19)
        self.calls = 0

    def loss(self, batch, step, micro):
        self.calls += 1
        return (self.module(batch.x[:1].expand(16, 6)) ** 2).mean()


def test_time_and_memory_are_those_of_the_steps():
    settings = toy_settings(steps=1000, accumulation=3)
    stage = Wide(settings)
    found = estimate(stage, settings, next(stage.batches(0)))
    assert stage.calls == 3  # two steps, and one more backward pass for the accumulation
    assert f"for 1000 steps of {found.step_seconds:.2g} s" in found.lines[0]
    weights = sum(p.nbytes for p in stage.module.parameters())  # and the average, two moments, the gradient
    assert found.memory_bytes > 5 * weights + (1 << 25)
    assert found.checkpoint_bytes == 4 * weights
    time, memory, disk = found.lines
    assert "1000 steps" in time and "come on top" in time
    assert "in this process" in memory and f"{format_bytes(4 * weights)} a checkpoint, up to 4" in disk


def test_a_step_after_an_estimate_is_the_step_without_one():
    settings = toy_settings()
    tried, fresh = Toy(settings), Toy(settings)
    estimate(tried, settings)
    outcomes, weights = [], []
    for stage in (tried, fresh):
        now = prepare(stage, settings, torch.device("cpu"))
        outcomes.append(take_step(stage, now, settings, stage.batches(0)))
        weights.append(now.tensors())
    assert outcomes[0] == outcomes[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
