"""A1111's schedule types against its formulas (modules/sd_schedulers.py, k-diffusion's get_sigmas), written out."""

import numpy as np
import pytest
import torch

from ldm.diffusion.names import SPACING_NAMES
from ldm.diffusion.schedule_types import SCHEDULE_TYPES, is_same, schedule_type
from ldm.diffusion.spacings import MULTISTEP, SPACINGS

THEIRS = {  # timesteps of a thousand
    "Uniform": lambda n: torch.linspace(999, 0, n).tolist(),
    "Simple": lambda n: [999 - int(i * (1000 / n)) for i in range(n)],
    "DDIM": lambda n: list(range(1, 1000, max(1000 // n, 1)))[::-1],
    "SGM Uniform": lambda n: torch.linspace(999, 0, n + 1)[:-1].tolist(),
}


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpm2", "dpmpp_2m", "dpmpp_sde", "ddpm"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "simple", "sgm_uniform"])
def test_a_type_is_named_where_its_timesteps_are_the_same_and_only_there(spacing, sampler):
    named = []
    for n in range(1, 101):
        ours = SPACINGS[spacing](1000, n, 1, sampler)
        theirs = np.array(THEIRS[SCHEDULE_TYPES[spacing]](n))
        same = ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() < 1e-3)
        assert schedule_type(spacing, sampler, n) == (SCHEDULE_TYPES[spacing] if same else None)
        named += [n] * same
    if spacing in ("simple", "sgm_uniform") or (spacing == "linspace" and sampler not in (*MULTISTEP, "ddpm")):
        assert len(named) == 100
    elif spacing == "trailing":
        assert {10, 20, 25, 40, 50} <= set(named) and 30 not in named
    elif sampler in MULTISTEP:
        assert not set(named) - {1}
    elif spacing == "leading":
        assert {10, 20, 25, 50} <= set(named) and not {7, 30} & set(named)


def test_what_no_type_names():
    assert schedule_type("leading", "euler", 20, offset=0) is None  # DDIM begins at 1
    assert schedule_type("ays", "euler", 10) is None
    assert not is_same("ays", "euler", 10)  # A1111 interpolates n steps down to sigma 0.029, we n + 1 and leave it out
    assert {schedule_type(name, "euler", 20) for name in SPACING_NAMES} >= {"Karras", "Exponential", "Beta"}


@pytest.mark.parametrize("n", range(1, 60))
def test_ddim_has_timesteps_of_its_own_in_a1111(n):
    """CompVisSampler.get_timesteps, whatever the schedule type; and UniPC's are the same."""
    theirs = np.clip(np.arange(0, 1000, 1000 // n) + 1, 0, 999)[::-1]
    same = np.array_equal(SPACINGS["leading"](1000, n, 1, "ddim"), theirs)
    assert schedule_type("leading", "ddim", n) == ("DDIM" if same else None)
    assert schedule_type("trailing", "ddim", n) is None and schedule_type("karras", "unipc", n) is None
