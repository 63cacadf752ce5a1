"""The noise of a step on a GPU: drawn by a thread while the one before is computed, the same numbers, and no wait."""

from itertools import pairwise
from types import SimpleNamespace

import torch

from ldm.diffusion.schedule import Schedule
from ldm.training.distributed import RowShard
from ldm.training.loop import seeded
from ldm.training.loop.seeded import AHEAD, Ahead
from ldm.training.stages.common import diffusion_loss
from tests.waits import META, Waits


def test_what_is_drawn_ahead_is_what_is_asked_for():
    ahead, parts = Ahead(), [(0, "noise", step, 0) for step in range(4)]
    for one, following in pairwise(parts):
        assert torch.equal(ahead.normal((2, 3), one, following), seeded.normal((2, 3), *one))
        assert torch.equal(ahead._coming[(2, 3), following].result(), seeded.normal((2, 3), *following))
    ahead._coming[(2, 3), parts[3]] = SimpleNamespace(result=lambda: "made")
    assert ahead.normal((2, 3), parts[3], parts[0]) == "made"  # and not drawn again
    assert torch.equal(ahead.normal((4, 3), parts[0], parts[1]), seeded.normal((4, 3), *parts[0]))  # another shape


def test_a_training_loss_waits_for_nothing():
    settings = SimpleNamespace(
        seed=0, noise_offset=0.1, timesteps="logit_normal", timestep_shift=2.0, snr_gamma=5.0, accumulation=2
    )
    batch = SimpleNamespace(latents=torch.empty(4, 4, 8, 8, device=META), part=RowShard(4), mask=None, weight=1.0)
    AHEAD.clear()
    with Waits() as counted:
        for step, micro in ((0, 0), (0, 1), (1, 0)):
            predict = lambda x, t: x * t.view(-1, 1, 1, 1)  # noqa: E731
            diffusion_loss(predict, Schedule("v_prediction"), settings, batch, step, micro)
    assert counted.launches and not +counted.waits
    ((key, coming),) = AHEAD[""]._coming.items()
    assert key == ((4, 4, 8, 8), (0, "noise", 1, 1))
    assert torch.equal(coming.result(), seeded.normal((4, 4, 8, 8), 0, "noise", 1, 1))
