"""Samplers: their order in closed form, and diffusers' schedulers of the same name step for step."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import SPACINGS, Schedule

ORDER = {"euler": 1, "ddim": 1, "dpmpp_2m": 2}  # a new sampler states its order here
PEERS = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE_ZERO_SNR = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}
# How far two right computations in fp32 may be apart. Euler in diffusers takes x + (sigma' - sigma) d, which at sigma
# 4096 loses two digits to cancellation (2e-5 is measured); ours does not.
ROUNDING = {"euler": 1e-4, "ddim": 1e-5, "dpmpp_2m": 1e-5}


# Order in closed form. Data: normal with standard deviation S; then the best denoiser is linear in x, and the exact
# path is x(sigma) = x(sigma_0) sqrt((S^2 + sigma^2) / (S^2 + sigma_0^2)).
S = 0.6


def gaussian(x, sigma):
    return S**2 / (S**2 + sigma.view(-1, 1, 1, 1) ** 2) * x


def end_of_path(name, steps, last=0.05, first=20.0):
    """(the sampler's end, the exact end) on continuous sigmas, equal in log sigma, in float64."""
    sigmas = torch.linspace(math.log(first), math.log(last), steps + 1, dtype=torch.float64).exp()
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64) * first
    exact = x * math.sqrt((S**2 + last**2) / (S**2 + first**2))
    if name == "ddim":  # which ends in the network's scale
        exact = exact / math.sqrt(1 + last**2)
    return SAMPLERS[name](gaussian, x, sigmas, None), exact


@pytest.mark.parametrize("name", SAMPLERS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name):
    errors = []
    for steps in (64, 128, 256):
        x, exact = end_of_path(name, steps)
        errors.append((x - exact).abs().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** ORDER[name], rel=0.08)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_solution_is_reached(name):
    x, exact = end_of_path(name, 400)
    assert torch.allclose(x, exact, rtol=2e-2 if ORDER[name] == 1 else 2e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_data_comes_out_with_its_spread_from_every_schedule(name):
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedules = (
        Schedule(**SD, spacing="trailing"),
        Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing"),
        Schedule("flow"),
    )
    for schedule in schedules:
        sigmas = schedule.sigmas(100, name)
        x = SAMPLERS[name](gaussian, schedule.initial(noise, sigmas, name), sigmas, None)
        assert x.std().item() == pytest.approx(S, rel=0.06)


# A toy network: random, nonlinear, dependent on picture, timestep and condition, computed in float64.
generator = torch.Generator().manual_seed(1)
W_IN, W_OUT = (torch.randn(*size, generator=generator, dtype=torch.float64) * 0.7 for size in ((4, 16), (16, 4)))
FREQUENCIES = torch.randn(16, generator=generator, dtype=torch.float64) / 100
NOISE = torch.randn(2, 4, 6, 5, generator=generator)


def network(x, timesteps, shift=0.0):
    hidden = torch.einsum("bchw,cd->bdhw", x.double(), W_IN) + shift
    hidden = hidden + torch.sin(FREQUENCIES * timesteps.double().view(-1, 1))[:, :, None, None]
    return torch.einsum("bdhw,dc->bchw", hidden.tanh(), W_OUT).to(x.dtype)


def ours(schedule, name, steps, predict=network):
    sigmas = schedule.sigmas(steps, name)
    return SAMPLERS[name](denoiser(predict, schedule), schedule.initial(NOISE, sigmas, name), sigmas, None)


def theirs(peer, steps, predict=network):
    peer.set_timesteps(steps)
    x = NOISE * peer.init_noise_sigma
    for t in peer.timesteps:
        raw = predict(peer.scale_model_input(x, t), t.float().expand(len(x)))
        x = peer.step(raw, t, x).prev_sample
    return x


# Not DDIM with linspace: diffusers' DDIM steps by T // n whatever the spacing, there not to its own next timestep.
PAIRS = [(name, spacing) for name in PEERS for spacing in SPACINGS if (name, spacing) != ("ddim", "linspace")]


def build_peer(name, **config):
    return PEERS[name](**config, **({"clip_sample": False} if name == "ddim" else {}))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("betas", [SD, LINEAR], ids=["sd", "linear"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name, spacing", PAIRS)
def test_final_latents_equal_diffusers(name, spacing, prediction_type, betas):
    config = {**betas, "prediction_type": prediction_type, "steps_offset": 1}
    peer = build_peer(
        name, **config, timestep_spacing=spacing, **({"set_alpha_to_one": False} if name == "ddim" else {})
    )
    for steps in (4, 25):
        assert distance(ours(Schedule(**config, spacing=spacing), name, steps), theirs(peer, steps)) < 5e-6


@pytest.mark.parametrize("steps", [10, 20, 25, 50])
@pytest.mark.parametrize("name", PEERS)
def test_the_shipped_configuration_equals_diffusers(name, steps):
    """v-prediction, cosine betas, zero terminal SNR, trailing; the peer is made from our scheduler_config.json."""
    schedule = Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing")
    peer = PEERS[name].from_config(schedule.to_diffusers())
    assert distance(ours(schedule, name, steps), theirs(peer, steps)) < ROUNDING[name]


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_ends_where_diffusers_ends(set_alpha_to_one):
    config = {**SD, "steps_offset": 1, "set_alpha_to_one": set_alpha_to_one}
    schedule = Schedule(**config)
    assert (schedule.sigmas(20, "ddim")[-1] == 0) == set_alpha_to_one
    assert distance(ours(schedule, "ddim", 20), theirs(build_peer("ddim", **config), 20)) < 5e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 20, 25, 30])
def test_flow_equals_diffusers(steps, shift):
    schedule = Schedule("flow", flow_shift=shift)
    peer = DPMSolverMultistepScheduler.from_config(schedule.to_diffusers())
    assert distance(ours(schedule, "dpmpp_2m", steps), theirs(peer, steps)) < 5e-6


@pytest.mark.parametrize("name", PEERS)
def test_guided_sampling_equals_diffusers(name):
    schedule = Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing")

    class Shift(torch.Tensor):
        @classmethod
        def cat(cls, parts):
            return torch.cat([part.as_subclass(torch.Tensor) for part in parts])

    def conditional(x, timesteps, cond):
        return network(x, timesteps, cond.view(-1, 1, 1, 1).double())

    def guided(x, timesteps):
        u, c = (network(x, timesteps, shift) for shift in (-0.5, 0.5))
        return u + 4.0 * (c - u)

    cond, uncond = (torch.full((len(NOISE),), shift).as_subclass(Shift) for shift in (0.5, -0.5))
    peer = PEERS[name].from_config(schedule.to_diffusers())
    result = ours(schedule, name, 20, cfg(conditional, cond, uncond, 4.0))
    assert distance(result, theirs(peer, 20, guided)) < ROUNDING[name]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_keeps_nothing_and_rows_do_not_meet(name):
    schedule = Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing")
    sigmas = schedule.sigmas(6, name)
    x, denoise = schedule.initial(NOISE, sigmas, name), denoiser(network, schedule)
    start = x.clone()
    together = SAMPLERS[name](denoise, x, sigmas, None)
    alone = torch.cat([SAMPLERS[name](denoise, row, sigmas, None) for row in x.split(1)])
    assert torch.equal(x, start)
    assert torch.equal(together, SAMPLERS[name](denoise, x, sigmas, None))
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step_and_no_gradient_is_kept(name):
    schedule = Schedule(**SD, spacing="trailing", set_alpha_to_one=True)
    sigmas = schedule.sigmas(5, name)
    weight = torch.tensor(1.0, requires_grad=True)
    seen = []
    result = SAMPLERS[name](
        denoiser(lambda x, t: network(x, t) * weight, schedule),
        schedule.initial(NOISE, sigmas, name),
        sigmas,
        None,
        callback=lambda i, x, x0: seen.append((i, x, x0)),
    )
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], result) and torch.allclose(seen[-1][2], result, atol=1e-6)
    assert not result.requires_grad
