"""Spacings against diffusers' tables and the formulas of A1111 and ComfyUI; sigmas and timesteps given by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers import AysSchedules
from sampler_cases import COSINE_ZERO_SNR, LINEAR, PEERS, SD, build_peer, distance, network, ours, theirs

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DDIM_INFINITY, Schedule
from ldm.diffusion.spacings import SIGMA_SPACINGS, SPACINGS
from ldm.errors import ConfigError

ZERO_SNR = Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing")
BY_DIFFUSERS = ("karras", "exponential", "beta")


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 100])
@pytest.mark.parametrize("betas", [SD, LINEAR, COSINE_ZERO_SNR], ids=["sd", "linear", "zero snr"])
@pytest.mark.parametrize("spacing", BY_DIFFUSERS)
def test_sigmas_in_the_whole_range_equal_diffusers(spacing, betas, steps):
    switch = {f"use_{spacing}_sigmas": True}
    for cls in (EulerDiscreteScheduler, UniPCMultistepScheduler):
        peer = cls(**betas, **switch, timestep_spacing="linspace")
        if (steps, cls) == (1, EulerDiscreteScheduler):
            continue  # whose one linspace step, and with it the range, is timestep 0
        peer.set_timesteps(steps)
        schedule = Schedule("v_prediction", **betas)
        assert torch.allclose(schedule.sigmas(steps, "euler", spacing), peer.sigmas, rtol=2e-6, atol=0)


@pytest.mark.parametrize("n", [2, 5, 33, 1000])
def test_beta_quantiles_equal_scipy(n):
    expected = scipy.stats.beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6)
    assert np.allclose(SPACINGS["beta"](0.0, 1.0, n), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 7, 25, 30, 1000])
def test_simple_and_sgm_uniform_equal_the_formulas_of_comfyui(steps):
    """simple_scheduler indexes the table from its end; normal_scheduler(sgm=True) drops the last of n + 1 timesteps."""
    schedule = Schedule(**SD)
    table = schedule.sigmas_all
    simple = [float(table[-(1 + int(x * (len(table) / steps)))]) for x in range(steps)]
    assert schedule.sigmas(steps, "euler", "simple").tolist() == [*simple, 0.0]
    uniform = schedule.sigmas(steps, "dpmpp_2m", "sgm_uniform")
    timesteps = torch.linspace(999, 0, steps + 1)[:-1]
    assert torch.allclose(schedule.timestep(uniform[:-1]), timesteps, rtol=0, atol=2e-3)
    low = timesteps.floor().long()  # k-diffusion's t_to_sigma: between two entries linear in log sigma
    logs = table.log()
    expected = (logs[low] + (timesteps - low) * (logs[(low + 1).clamp(max=999)] - logs[low])).exp()
    assert torch.allclose(uniform[:-1], expected, rtol=2e-3 if steps < 1000 else 2e-2)


def test_simple_sgm_uniform_and_trailing_are_three_things():
    schedule = Schedule(**SD)
    tables = [
        schedule.timestep(schedule.sigmas(7, "euler", name)[:-1]) for name in ("simple", "sgm_uniform", "trailing")
    ]
    assert tables[0].tolist() == [999, 857, 714, 571, 428, 285, 142]
    assert torch.allclose(tables[1], 999 - 999 / 7 * torch.arange(7), atol=1e-3)
    assert tables[2].tolist() == [999, 856, 713, 570, 428, 285, 142]


@pytest.mark.parametrize("spacing, peer", [("ays", "StableDiffusion"), ("ays_xl", "StableDiffusionXL")])
def test_align_your_steps_equals_the_published_tables(spacing, peer):
    schedule = Schedule(**SD)
    ten = schedule.sigmas(10, "euler", spacing)
    assert torch.equal(ten, torch.tensor(AysSchedules[f"{peer}Sigmas"]))
    published = torch.tensor(AysSchedules[f"{peer}Timesteps"])
    assert (schedule.timestep(ten[:-1]) - published).abs().max() < 5  # rounded, and to SD's own table
    twenty = schedule.sigmas(20, "euler", spacing)
    assert torch.allclose(twenty[:-1:2], ten[:-1])
    assert torch.allclose(twenty[1:-2:2] ** 2, ten[:-2] * ten[1:-1])  # log-linear: geometric means between
    assert twenty[-2].item() == pytest.approx(math.sqrt(ten[-2] * 0.029), rel=1e-5)


def test_align_your_steps_is_refused_where_the_noise_is_another():
    for schedule in (ZERO_SNR, Schedule(**LINEAR)):
        with pytest.raises(ConfigError, match="Align Your Steps was tuned for Stable Diffusion's noise"):
            schedule.sigmas(10, "euler", "ays")


@pytest.mark.parametrize("name", [name for name in PEERS if name in ("heun", "lms", "unipc", "dpmpp_2m", "euler")])
@pytest.mark.parametrize("spacing", BY_DIFFUSERS)
def test_final_latents_equal_diffusers_with_these_spacings(name, spacing):
    """With a network that looks at no timestep: diffusers rounds some of them, k-diffusion and we do not."""
    peer = build_peer(name, **SD, **{f"use_{spacing}_sigmas": True}, timestep_spacing="linspace")

    def timeless(x, timesteps):
        return network(x, timesteps * 0)

    schedule = Schedule(**SD, spacing="linspace")
    assert distance(ours(schedule, name, 8, timeless, spacing=spacing), theirs(peer, 8, timeless)) < 1e-4


@pytest.mark.parametrize("schedule", [Schedule(**SD), ZERO_SNR, Schedule(**LINEAR, steps_offset=0)])
@pytest.mark.parametrize("spacing", [name for name in SPACINGS if not name.startswith("ays")])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "heun_flow"])
def test_every_sampler_goes_with_every_spacing(sampler, spacing, schedule):
    for steps in (1, 2, 20, 250):
        sigmas = schedule.sigmas(steps, sampler, spacing)
        assert sigmas.shape == (steps + 1,) and sigmas.isfinite().all()
        assert (sigmas.diff()[:-1] < 0).all() and sigmas[-1] <= sigmas[-2]
        assert (sigmas[-1] == 0) == (sampler not in ("ddim", "tcd") or spacing in SIGMA_SPACINGS)
    start, sigmas = torch.ones(1, 1, 1, 1), schedule.sigmas(3, sampler, spacing)
    x = SAMPLERS[sampler](lambda x, sigma: x * 0, start, sigmas, lambda i: start)
    assert x.shape == start.shape and x.isfinite().all()


def test_lcm_has_its_own_timesteps_unless_a_spacing_is_chosen():
    schedule = Schedule(**SD)
    own = schedule.timestep(schedule.sigmas(4, "lcm")[:-1]).tolist()
    assert own == [999, 759, 499, 259]
    assert torch.equal(schedule.sigmas(4, "lcm", "sgm_uniform"), schedule.sigmas(4, "euler", "sgm_uniform"))
    with pytest.raises(ConfigError, match="lcm has 50 steps of its own, not 51"):
        schedule.sigmas(51, "lcm")


def test_timesteps_given_by_hand_are_what_diffusers_makes_of_them():
    timesteps = AysSchedules["StableDiffusionTimesteps"]
    peer = EulerDiscreteScheduler(**SD)
    peer.set_timesteps(timesteps=timesteps)
    assert torch.equal(Schedule(**SD).given(timesteps=timesteps), peer.sigmas)
    assert Schedule(**SD).given("ddim", timesteps=[999, 1])[-1] == Schedule(**SD).sigmas_all[0]
    assert ZERO_SNR.given("ddim", timesteps=[999, 1])[0] == DDIM_INFINITY
    assert ZERO_SNR.given("euler", timesteps=[999, 0])[0] == ZERO_SNR.sigmas_all[-1]
    assert Schedule("flow").given(timesteps=[750.0, 500.0]).tolist() == pytest.approx([3, 1, 0])


def test_sigmas_given_by_hand_may_end_in_zero():
    table = AysSchedules["StableDiffusionXLSigmas"]
    peer = EulerDiscreteScheduler(**SD)
    peer.set_timesteps(sigmas=table)
    for given in (table, table[:-1], np.array(table), torch.tensor(table)):
        assert torch.allclose(Schedule(**SD).given(sigmas=given), peer.sigmas)
    flow = Schedule("flow").given("unipc", sigmas=[1.0, 0.75, 0.5])  # flow's sigmas are times, as in diffusers
    assert flow[0].item() == pytest.approx(1e6, rel=0.05) and flow[1:].tolist() == pytest.approx([3, 1, 0])


@pytest.mark.parametrize(
    "schedule, given, said",
    [
        (Schedule(), {}, "either timesteps or sigmas"),
        (Schedule(), {"timesteps": [1], "sigmas": [1.0]}, "either timesteps or sigmas"),
        (Schedule(), {"timesteps": "many"}, "timesteps: expected a list of numbers"),
        (Schedule(), {"timesteps": [[3, 2], [1, 0]]}, "timesteps: expected a list of 1 to 1000"),
        (Schedule(), {"timesteps": []}, "timesteps: expected a list of 1 to 1000"),
        (Schedule(), {"timesteps": list(range(1001, 0, -1))}, "timesteps: expected a list of 1 to 1000"),
        (Schedule(), {"sigmas": [3.0, float("nan")]}, "sigmas: expected a list of 1 to 1000 finite numbers"),
        (Schedule(), {"sigmas": [3.0, 3.0]}, "sigmas: each has to be lower"),
        (Schedule(), {"timesteps": [1, 2]}, "timesteps: each has to be lower"),
        (Schedule(), {"timesteps": [1000, 2]}, "timesteps: 2 to 1000 is not inside 0 to 999"),
        (Schedule(), {"timesteps": [20, -1]}, "not inside 0 to 999"),
        (Schedule(), {"sigmas": [80.0, 2.0]}, "sigmas: 2 to 80 is not inside 0 to"),
        (Schedule(), {"sigmas": [0.0]}, "not inside"),
        (Schedule(), {"sigmas": [2.0, -1.0]}, "not inside"),
        (Schedule(), {"sigmas": [2.0, 2.0 - 1e-12]}, "sigmas: two are too close together"),
        (Schedule("flow"), {"sigmas": [2.0, 1.0]}, "not inside 0 to 1"),
        (Schedule("flow"), {"timesteps": [500, 0]}, "not inside 0 to 1000"),
        (Schedule("flow"), {"timesteps": [1000, 999.9999]}, "too close together"),
    ],
)
def test_lists_that_make_no_sense_are_refused(schedule, given, said):
    with pytest.raises(ConfigError, match=said):
        schedule.given("euler", **given)
