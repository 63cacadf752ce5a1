"""What the tests of guidance share: the least of a condition, and a network that counts its rows."""

import torch


class Rows:
    """The least that a condition has to be."""

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float32)

    def __len__(self):
        return len(self.values)

    @classmethod
    def cat(cls, parts):
        return cls(torch.cat([part.values for part in parts]))


class Network:
    """Counts rows; its answer depends on picture, timestep, condition and perturbation."""

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
