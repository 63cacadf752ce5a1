"""What the tests of guidance share: the least of a condition, and a network that counts its rows."""

import torch

from ldm.diffusion.denoiser import scalings
from ldm.diffusion.schedule import Schedule

SCHEDULE, FLOW = Schedule("sample"), Schedule("flow")  # of the first, x0 is the network's answer itself
STEPS = 10
SIGMAS, FLOW_SIGMAS = SCHEDULE.sigmas(STEPS), FLOW.sigmas(STEPS)


def inputs_at(x, sigma, schedule=SCHEDULE):
    """(the network's x, its timesteps) at one sigma."""
    c_in = scalings(schedule.prediction_type, sigma.float())[2]
    return c_in * x, schedule.timestep(sigma).expand(len(x))


def x0_of(raw, x, sigma, schedule=SCHEDULE):
    """What the network's answer to x at one sigma means."""
    c_skip, c_out, _ = scalings(schedule.prediction_type, sigma.float())
    return c_skip * x + c_out * raw


class Rows:
    """The least that a condition has to be."""

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float32)

    def __len__(self):
        return len(self.values)

    @property
    def inputs(self):
        return {"cond": self}

    @classmethod
    def cat(cls, parts):
        return cls(torch.cat([part.values for part in parts]))


class Network:
    """Counts rows; its answer depends on image, timestep, condition and perturbation."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, timesteps, cond, perturb=None, perturb_in=()):
        assert len(x) == len(timesteps) == len(cond)
        self.calls.append(len(x))
        raw = torch.tanh(x + cond.values.view(-1, 1, 1, 1)) * (1 + timesteps.view(-1, 1, 1, 1) / 1000)
        if perturb is None:
            return raw
        assert perturb_in and len(perturb) == len(x)
        return torch.where(perturb.view(-1, 1, 1, 1), raw.roll(1, -1), raw)
