"""Schedules: betas, sigmas and timesteps equal to diffusers' to the last bit, and what the caps do."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from sampler_cases import PEERS, SD

from ldm.diffusion.schedule import BETAS, Schedule
from ldm.diffusion.spacings import MULTISTEP, SCHEDULE_SPACINGS, WHOLE
from ldm.errors import ConfigError

ZERO_SNR = Schedule("v_prediction", "squaredcos_cap_v2", rescale_betas_zero_snr=True, spacing="trailing")


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", BETAS)
def test_alphas_cumprod_and_sigmas_equal_diffusers(beta_schedule, zero_snr):
    config = {**SD, "beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr}
    ours = Schedule("v_prediction", **config)
    assert torch.equal(ours.alphas_cumprod, DDIMScheduler(**config).alphas_cumprod)
    assert torch.equal(ours.sigmas_all, EulerDiscreteScheduler(**config).sigmas[:-1].flip(0))
    assert ours.sigmas_all.isfinite().all() and (ours.sigmas_all.diff() > 0).all()


@pytest.mark.parametrize("steps", [2, 7, 25, 30, 50])
@pytest.mark.parametrize("spacing", SCHEDULE_SPACINGS)
@pytest.mark.parametrize("sampler", [name for name in PEERS if name not in ("dpm2", "dpmpp_sde", "lcm")])
def test_timesteps_and_sigmas_of_each_sampler_equal_diffusers(sampler, spacing, steps):
    """Not dpm2 and dpmpp_sde, whose peers take seconds to build and divide as Euler, and lcm, which has its own."""
    schedule = Schedule(**SD, spacing=spacing, steps_offset=1)
    peer = PEERS[sampler](**SD, timestep_spacing=spacing, steps_offset=1)
    peer.set_timesteps(steps)
    sigmas = schedule.sigmas(steps, sampler)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
    timesteps = torch.unique_consecutive(peer.timesteps).double()  # Heun's come twice
    assert torch.allclose(schedule.timestep(sigmas[:-1]).double(), timesteps, rtol=0, atol=1e-3)
    if sampler not in WHOLE:
        assert torch.equal(sigmas, torch.unique_consecutive(peer.sigmas))
    else:
        assert sigmas[-1] == (schedule.sigmas_all[0] if sampler == "ddim" else 0)


def test_one_step_starts_at_full_noise_with_every_spacing_that_can():
    """diffusers' Euler and DDIM start their only linspace step at timestep 0, where there is no noise to remove."""
    for sampler in PEERS:
        for spacing in ("linspace", "trailing"):
            schedule = Schedule(spacing=spacing)
            assert schedule.timestep(schedule.sigmas(1, sampler)[0]) == 999


def test_spacing_can_be_chosen_for_one_call():
    assert torch.equal(Schedule().sigmas(20, "euler", spacing="trailing"), Schedule(spacing="trailing").sigmas(20))
    assert not torch.equal(Schedule().sigmas(20, "euler"), Schedule(spacing="trailing").sigmas(20))


@pytest.mark.parametrize("schedule", [Schedule(), ZERO_SNR, Schedule("v_prediction", "linear")])
def test_timestep_is_the_inverse_of_sigma(schedule):
    whole = torch.arange(1000)
    assert torch.equal(schedule.timestep(schedule.sigma(whole)), whole.float())
    fractions = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 999
    assert torch.allclose(schedule.timestep(schedule.sigma(fractions)), fractions, rtol=0, atol=2e-3)
    assert schedule.timestep(0.0) == 0 and schedule.timestep(1e9) == 999


def test_zero_terminal_snr_is_exact_in_training_and_capped_in_sampling():
    alpha, sigma = ZERO_SNR.alpha_sigma(torch.tensor([0, 999]))
    assert alpha[1] == 0 and sigma[1] == 1
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(2))
    assert ZERO_SNR.sigmas_all[-1].item() == pytest.approx(4096, rel=1e-6)
    assert ZERO_SNR.sigmas(25, "euler")[0] == ZERO_SNR.sigmas(25, "dpmpp_2m")[0] == ZERO_SNR.sigmas_all[-1]
    assert ZERO_SNR.sigmas(25, "ddim")[0] == 2**20  # where 4096 would still be seen
    assert ZERO_SNR.timestep(ZERO_SNR.sigmas(25, "ddim")[0]) == 999


def test_flow_is_t_over_one_minus_t():
    schedule = Schedule("flow")
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.25, 0.5]))
    assert alpha.tolist() == [0.75, 0.5] and sigma.tolist() == [0.25, 0.5]
    assert schedule.sigma(750.0).item() == pytest.approx(3.0)
    assert schedule.timestep(3.0) == 750
    assert schedule.network_timesteps(torch.tensor([0.5004, 0.5006])).tolist() == [500, 500]
    assert schedule.sigma(1000.0).isfinite() and schedule.sigmas_all.isfinite().all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_and_timesteps_equal_diffusers_for_every_step_count(shift):
    schedule = Schedule("flow", flow_shift=shift)
    peer = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for steps in range(1, 101):
        peer.set_timesteps(steps)
        sigmas = schedule.sigmas(steps, "dpmpp_2m")
        assert sigmas[-1] == 0
        assert torch.allclose(sigmas / (1 + sigmas), peer.sigmas, rtol=0, atol=5e-7)
        assert torch.equal(schedule.timestep(sigmas[:-1]).long(), peer.timesteps), steps


def test_initial_noise_has_the_scale_that_each_peer_gives_it():
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for spacing in SCHEDULE_SPACINGS:
        schedule = Schedule(**SD, spacing=spacing)
        peer = EulerDiscreteScheduler(**SD, timestep_spacing=spacing, steps_offset=1)
        peer.set_timesteps(20)
        sigmas = schedule.sigmas(20, "euler")
        expected = noise * peer.init_noise_sigma
        assert torch.allclose(schedule.initial(noise, sigmas, "euler"), expected, rtol=1e-6)
        assert torch.allclose(Schedule(**SD).initial(noise, sigmas, "euler", spacing), expected, rtol=1e-6)
        for sampler in (*WHOLE, *MULTISTEP):  # the network sees the noise as it is
            sigmas = schedule.sigmas(20, sampler)
            x = schedule.initial(noise, sigmas, sampler)
            assert torch.allclose(x / math.sqrt(1 + sigmas[0] ** 2), noise, rtol=1e-6)
    flow = Schedule("flow")
    sigmas = flow.sigmas(20)
    assert torch.allclose(flow.initial(noise, sigmas) / (1 + sigmas[0]), noise, rtol=1e-6)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"prediction_type": "v_predicton"}, "did you mean 'v_prediction'"),
        ({"beta_schedule": "cosine"}, "unknown beta_schedule 'cosine'"),
        ({"spacing": "trailling"}, "did you mean 'trailing'"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "betas must rise"),
        ({"beta_end": float("nan")}, "betas must rise"),
        ({"num_train_timesteps": 1}, "at least 2"),
        ({"steps_offset": -1}, "must not be negative"),
        ({"prediction_type": "flow", "flow_shift": 0.0}, "flow_shift must be a positive number"),
        ({"prediction_type": "flow", "rescale_betas_zero_snr": True}, "does not go with flow"),
        ({"flow_shift": 3.0}, "goes with prediction_type flow only"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        Schedule(**change)


@pytest.mark.parametrize(
    "schedule, arguments, said",
    [
        (Schedule(), (0, "euler"), "at least 1"),
        (Schedule(), (-3, "euler"), "at least 1"),
        (Schedule(), (1001, "euler"), "too many"),
        (Schedule(), (1000, "dpmpp_2m"), "too many"),
        (Schedule(), (1000, "euler"), "too many"),  # 1000 + offset 1 has no last timestep
        (Schedule(), (20, "euler", "traling"), "did you mean 'trailing'"),
        (Schedule("flow"), (20, "euler", "trailing"), "does not apply"),
    ],
)
def test_impossible_steps_and_spacings_are_refused(schedule, arguments, said):
    with pytest.raises(ConfigError, match=said):
        schedule.sigmas(*arguments)


def test_all_training_timesteps_can_be_visited():
    schedule = Schedule(steps_offset=0)
    assert np.array_equal(schedule.timestep(schedule.sigmas(1000)[:-1]).numpy(), np.arange(999, -1, -1))


def test_timesteps_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="flow takes floats"):
        Schedule("flow").alpha_sigma(torch.tensor([500]))
    with pytest.raises(TypeError, match="betas take integers"):
        Schedule().alpha_sigma(torch.tensor([0.5]))
