"""MPS has no float64, and averages areas of equal size alone; fake tensors stand for those of an Apple machine."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.denoiser import denoiser, x0_error
from ldm.diffusion.schedule import Schedule
from ldm.nn.tiling import _smaller


class Apple(TorchDispatchMode):
    """Raises where MPS would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(one) and one.device.type == "mps":
                assert one.dtype != torch.float64, f"{func} in float64"
        if "adaptive_avg_pool2d" in str(func) and args[0].device.type == "mps":
            assert args[0].shape[-1] % args[1][-1] == 0, "an area that is not the same everywhere"
        return result


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_validation_and_denoising(prediction_type):
    schedule = Schedule(prediction_type)
    with FakeTensorMode(allow_non_fake_inputs=True), Apple():
        x0, noise = torch.empty(2, 2, 4, 8, 8, device="mps")
        error = x0_error(lambda x, t: x * t.view(-1, 1, 1, 1), schedule, x0, noise, torch.empty(2, device="mps"))
        assert error.device.type == "mps"
        assert schedule.timestep(torch.empty(2, device="mps")).shape == (2,)
        denoiser(lambda x, t: x, schedule)(x0, torch.tensor([3.0, 3.0]))


def test_an_image_made_as_small_as_a_tile_that_does_not_divide_it():
    with FakeTensorMode(), Apple():
        small = _smaller(torch.empty(1, 3, 152, 200, device="mps"), (128, 128), pixels=True)
        assert small.shape == (1, 3, 128, 128) and small.device.type == "mps"


def test_the_fake_machine_does_refuse():
    with FakeTensorMode(), Apple():
        with pytest.raises(AssertionError, match="float64"):
            torch.ones(2, device="mps").double()
        with pytest.raises(AssertionError, match="area"):
            torch.nn.functional.interpolate(torch.ones(1, 1, 10, 10, device="mps"), (4, 4), mode="area")
