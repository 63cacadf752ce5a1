"""A1111's schedule types beside our spacings. No torch here.

Where both place sigmas by one formula (Karras, Exponential, Beta) they are the same; where they choose among the
timesteps, it depends on the sampler and the number of steps (modules/sd_schedulers.py of A1111).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ldm.diffusion.spacings import SPACINGS


def uniform(total: int, n: int) -> np.ndarray:
    """n timesteps from T - 1 to 0, fractions included, for every sampler."""
    return np.linspace(total - 1.0, 0, n)


def ddim(total: int, n: int) -> np.ndarray:
    """Every (T // n)-th timestep from 1 on: more than n where T // n does not divide T - 1 into n parts."""
    return np.arange(1.0, total, max(total // n, 1))[::-1]


SCHEDULE_TYPES = {"leading": "DDIM", "linspace": "Uniform", "trailing": "Simple", "simple": "Simple"}  # spacing -> type
SCHEDULE_TYPES |= {"sgm_uniform": "SGM Uniform", "karras": "Karras", "exponential": "Exponential", "beta": "Beta"}
COMPARED: dict[str, Callable[[int, int], np.ndarray]] = {  # those that are not always the same
    "leading": ddim,
    "linspace": uniform,
    "trailing": lambda total, n: SPACINGS["simple"](total, n, 0, ""),
}
FIXED = ("ddim", "unipc")  # A1111 gives these DDIM's timesteps, whatever the schedule type


def is_same(spacing: str, sampler: str, n: int, total: int = 1000, offset: int = 1) -> bool:
    """Whether n steps of a spacing are those of A1111's schedule type, with a schedule of so many timesteps."""
    if spacing not in COMPARED:
        return spacing in SCHEDULE_TYPES
    ours, theirs = SPACINGS[spacing](total, n, offset, sampler), COMPARED[spacing](total, n)
    return ours.shape == theirs.shape and bool(np.allclose(ours, theirs, rtol=0, atol=1e-3))


def schedule_type(spacing: str, sampler: str, n: int, total: int = 1000, offset: int = 1) -> str | None:
    """A1111's schedule type that gives the same n steps; None where none does."""
    if not is_same(spacing, sampler, n, total, offset):
        return None
    if sampler in FIXED and (spacing != "leading" or (total - 1) % max(total // n, 1) == 0):  # there T - 1 is one more
        return None
    return SCHEDULE_TYPES[spacing]
