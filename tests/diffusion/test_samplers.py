"""Samplers: their order in closed form, and diffusers' schedulers of the same name step for step."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from sampler_cases import (
    COSINE_ZERO_SNR,
    EPSILON_AND_V,
    LINEAR,
    NOISE,
    OWN,
    PEERS,
    SD,
    S,
    build_peer,
    distance,
    draws,
    gaussian,
    network,
    ours,
    seeded,
    theirs,
)

from ldm.diffusion.denoiser import consistency, denoiser, sample
from ldm.diffusion.diffusers_config import write_scheduler
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.names import ETA, FLOW_SAMPLERS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.spacings import SCHEDULE_SPACINGS
from ldm.pipeline.encode import Noise

# A new sampler states its order here; those with an eta are solved without noise. dpmpp_3m_sde: see its docstring.
ORDER = {"euler": 1, "ddim": 1, "heun": 2, "heun_flow": 2, "dpm2": 2, "dpmpp_2m": 2, "unipc": 3, "lms": 4}
ORDER |= {"tcd": 1}
ORDER |= {"euler_ancestral": 1, "dpmpp_2s_ancestral": 2, "dpmpp_sde": 2, "dpmpp_2m_sde": 2, "dpmpp_3m_sde": 2}
NO_ORDER = {"ddpm", "lcm"}  # always stochastic
# (first sigma, step counts) of the order test. lms begins as Euler, so that its own order is seen on a path that
# begins straight, which it is at large sigma.
PATHS = {"lms": (200.0, (256, 512, 1024))}
# How far two right computations in fp32 may be apart. diffusers takes x + (sigma' - sigma) d, which at sigma 4096 loses
# two digits to cancellation (2e-5 is measured). euler_ancestral: 2.8e-5, ddpm: 1.2e-5 (measured). lcm, guided: 8e-5 is
# measured, and moving the toy's answers by 1e-7 moves diffusers' own result by 2e-4.
ROUNDING = {"euler": 1e-4, "euler_ancestral": 5e-5, "ddpm": 5e-5, "lcm": 5e-4}
# dpm2 and dpmpp_sde ask between two entries of the table; there diffusers interpolates the timestep in log sigma, we in
# sigma: up to 0.04 of a timestep apart.
# heun and lms multiply rounding by sigma / sigma': moving the noise by 1e-7 moves diffusers' own result as far.
BETWEEN = {"dpm2": 1e-4, "euler_ancestral": 2e-5, "heun": 2e-5, "lms": 2e-5}
FEW = {"heun": (10, 25), "lms": (4, 10)}  # step counts; the peer of lms integrates numerically, which takes long
ZERO_SNR_PEERS = ("euler", "ddim", "dpmpp_2m", "unipc", "ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm")
STEP_PEERS = [name for name in PEERS if name != "dpmpp_sde"]  # which draws from a tree: test_stochastic_samplers.py


# Order in closed form. Data: normal with standard deviation S; then the best denoiser is linear in x, and the exact
# path is x(sigma) = x(sigma_0) sqrt((S^2 + sigma^2) / (S^2 + sigma_0^2)).
def end_of_path(name, steps, last=0.05, first=20.0):
    """(the sampler's end, the exact end) on continuous sigmas, equal in log sigma, in float64."""
    sigmas = torch.linspace(math.log(first), math.log(last), steps + 1, dtype=torch.float64).exp()
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64) * first
    exact = x * math.sqrt((S**2 + last**2) / (S**2 + first**2))
    if name in ("ddim", "tcd"):  # which end in the network's scale
        exact = exact / math.sqrt(1 + last**2)
    return SAMPLERS[name](gaussian, x, sigmas, None, **({"eta": 0.0} if name in ETA else {})), exact


def test_every_sampler_states_its_order():
    assert set(ORDER) | NO_ORDER == set(SAMPLERS) and not set(ORDER) & NO_ORDER


@pytest.mark.parametrize("name", ORDER)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name):
    first, counts = PATHS.get(name, (20.0, (64, 128, 256)))
    errors = []
    for steps in counts:
        x, exact = end_of_path(name, steps, first=first)
        errors.append((x - exact).abs().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** ORDER[name], rel=0.08)


@pytest.mark.parametrize("name", ORDER)
def test_the_exact_solution_is_reached(name):
    x, exact = end_of_path(name, 400)
    assert torch.allclose(x, exact, rtol=2e-2 if ORDER[name] == 1 else 2e-4)


def schedules_of(name):
    betas = (Schedule(**SD, spacing="trailing"), Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing"))
    flow = (Schedule("flow"),)
    return flow if name == "heun_flow" else betas + flow if name in FLOW_SAMPLERS else betas


@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_data_comes_out_with_its_spread_from_every_schedule(name):
    start = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def consistent(x, sigma):  # lcm's denoiser leads to the end of the path at once
        return x * S / (S**2 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()

    more = {"eta": 0.0} if name == "tcd" else {}  # whose gamma wants a denoiser that knows where the step goes
    for schedule in schedules_of(name):
        sigmas = schedule.sigmas({"lcm": 8, "tcd": 50}.get(name, 100), name)
        x = schedule.initial(start, sigmas, name)
        x = SAMPLERS[name](consistent if name == "lcm" else gaussian, x, sigmas, draws(x.shape), **more)
        assert x.std().item() == pytest.approx(S, rel=0.06)


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("heun_flow", "tcd")])
def test_few_steps_from_zero_snr_stay_sound(name):
    """Sigma 4096 stands for infinity: Heun's mean of two slopes there would give 3.8 for 0.6.

    Nor does anybody that corrects Euler's step by a second answer ask for one between it and the next sigma.
    """
    schedule = Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing")
    start = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = schedule.sigmas(8, name)
    asked = []

    def watched(x, sigma):
        asked.append(sigma[0].item())
        return gaussian(x, sigma)

    x = SAMPLERS[name](watched, schedule.initial(start, sigmas, name), sigmas, draws(start.shape))
    assert x.std().item() == pytest.approx(S, rel=0.25)
    assert name == "dpmpp_sde" or not [sigma for sigma in asked if sigmas[1] < sigma < sigmas[0]]


# Not DDIM with linspace: diffusers' DDIM steps by T // n whatever the spacing, there not to its own next timestep.
# LCM has timesteps of its own.
PAIRS = [
    (name, spacing)
    for name in STEP_PEERS
    for spacing in SCHEDULE_SPACINGS
    if (name, spacing) != ("ddim", "linspace") and name != "lcm"
]


TYPES = [("epsilon", SD), ("v_prediction", LINEAR), ("sample", SD), ("epsilon", LINEAR), ("v_prediction", SD)]
CASES = [
    (name, spacing, prediction_type, betas)
    for name, spacing in PAIRS
    for prediction_type, betas in (TYPES[:2] if name in EPSILON_AND_V else TYPES[:3] if name in FEW else TYPES)
    if name != "dpm2" or (spacing, betas) in (("trailing", SD), ("linspace", LINEAR))  # whose peer takes long to build
]


@pytest.mark.parametrize("name, spacing, prediction_type, betas", CASES)
def test_final_latents_equal_diffusers(name, spacing, prediction_type, betas):
    config = {**betas, "prediction_type": prediction_type, "steps_offset": 1}
    alpha = {"set_alpha_to_one": False} if name == "ddim" else {}
    peer = build_peer(name, **config, timestep_spacing=spacing, **alpha)
    for steps in FEW.get(name, (4, 25)):
        result = ours(Schedule(**config, spacing=spacing), name, steps)
        assert distance(result, theirs(peer, steps, **seeded(name))) < BETWEEN.get(name, 5e-6)


@pytest.mark.parametrize("steps", [10, 20, 25, 50])
@pytest.mark.parametrize("name", ZERO_SNR_PEERS)
def test_the_shipped_configuration_equals_diffusers(name, steps):
    """v-prediction, cosine betas, zero terminal SNR, trailing; the peer is made from our scheduler_config.json."""
    schedule = Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing")
    peer = PEERS[name].from_config(write_scheduler(schedule), **OWN.get(name, {}))
    assert distance(ours(schedule, name, steps), theirs(peer, steps, **seeded(name))) < ROUNDING.get(name, 1e-5)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_ends_where_diffusers_ends(set_alpha_to_one):
    config = {**SD, "steps_offset": 1, "set_alpha_to_one": set_alpha_to_one}
    schedule = Schedule(**config)
    assert (schedule.sigmas(20, "ddim")[-1] == 0) == set_alpha_to_one
    assert distance(ours(schedule, "ddim", 20), theirs(build_peer("ddim", **config), 20)) < 5e-6


@pytest.mark.parametrize("steps", [1, 4, 12])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_lcm_equals_diffusers(prediction_type, steps):
    schedule = Schedule(prediction_type, **SD)
    peer = build_peer("lcm", prediction_type=prediction_type, **SD)
    assert distance(ours(schedule, "lcm", steps), theirs(peer, steps, **seeded("lcm"))) < 5e-6
    assert torch.equal(schedule.timestep(schedule.sigmas(steps, "lcm")[:-1]).long(), peer.timesteps)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type, steps", [("epsilon", 4), ("v_prediction", 8), ("sample", 4), ("epsilon", 1)])
def test_tcd_equals_diffusers(prediction_type, steps, gamma):
    schedule = Schedule(prediction_type, **SD)
    peer, sigmas = TCDScheduler(prediction_type=prediction_type, **SD), schedule.sigmas(steps, "tcd")
    result = sample(denoiser(network, schedule), schedule, sigmas, NOISE, "tcd", noise=draws(), eta=gamma)
    assert distance(result, theirs(peer, steps, eta=gamma, generator=torch.Generator().manual_seed(7))) < 5e-6
    assert torch.equal(schedule.timestep(sigmas[:-1]).round().long(), peer.timesteps)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm_on_a_flow_model_equals_diffusers(steps):
    """On the peer's own times; the denoiser of a flow model is used as it is, without LCM's boundary."""
    schedule, peer, generator = Schedule("flow"), FlowMatchLCMScheduler(shift=3.0), torch.Generator().manual_seed(7)
    peer.set_timesteps(steps)
    sigmas, x = schedule.given("lcm", sigmas=peer.sigmas), NOISE
    for t in peer.timesteps:
        told = schedule.network_timesteps(t.double() / 1000).clamp(max=999).expand(len(x))
        x = peer.step(network(x, told), t, x, generator=generator).prev_sample
    result = sample(denoiser(network, schedule), schedule, sigmas, NOISE, "lcm", noise=draws())
    assert distance(result, x) < 1e-5


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_euler_with_trailing_spacing_is_what_lightning_was_made_for(steps):
    """The peer as its authors set it up: leading in the file, trailing at run time; any schedule takes the spacing."""
    schedule = Schedule(**SD)
    peer = build_peer("euler", **SD, timestep_spacing="trailing", steps_offset=1)
    result = ours(schedule, "euler", steps, spacing="trailing")
    assert distance(result, theirs(peer, steps)) < 5e-6
    assert schedule.timestep(schedule.sigmas(steps, "euler", "trailing")[0]).item() == 999


def test_a_consistency_model_keeps_the_picture_where_there_is_no_noise():
    """At timestep 0 the boundary condition gives x in the network's scale, whatever the network says."""
    schedule = Schedule(**SD)
    denoise = consistency(denoiser(lambda x, t: x * 1e6, schedule), schedule)
    sigma = schedule.sigmas_all[:1].expand(len(NOISE))
    assert torch.allclose(denoise(NOISE, sigma), NOISE / (1 + sigma[0] ** 2).sqrt())
    peer = build_peer("lcm", **SD)
    for t in (1, 5, 20):  # where c_skip is still seen
        peer.set_timesteps(timesteps=[t])
        sigma = schedule.sigma(float(t))
        raw = network(NOISE, torch.full((2,), float(t)))
        expected = peer.step(raw, t, NOISE).denoised
        x = NOISE * (1 + sigma**2).sqrt()
        result = consistency(denoiser(network, schedule), schedule)(x, sigma.expand(2))
        assert distance(result, expected) < 2e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 20, 25, 30])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_flow_equals_diffusers(name, steps, shift):
    schedule = Schedule("flow", flow_shift=shift)
    cls = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    peer = cls.from_config(write_scheduler(schedule), **OWN.get(name, {}))
    # UniPC begins at t = 1 - 1e-6, of whose distance to 1 fp32 keeps two digits, in diffusers
    limit = 5e-5 if name == "unipc" else 5e-6
    assert distance(ours(schedule, name, steps), theirs(peer, steps, **seeded(name))) < limit


@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize(
    "name, cls", [("euler", FlowMatchEulerDiscreteScheduler), ("heun_flow", FlowMatchHeunDiscreteScheduler)]
)
def test_solvers_in_the_time_of_flow_equal_diffusers(name, cls, steps):
    """On the peer's own times, whose first is 1 (ours 0.999999); the network is told whole timesteps."""
    schedule, peer = Schedule("flow"), cls(shift=3.0)
    peer.set_timesteps(steps)
    sigmas = schedule.given(name, sigmas=torch.unique_consecutive(peer.sigmas))
    x = NOISE
    for t in peer.timesteps:
        told = schedule.network_timesteps(t.double() / 1000).clamp(max=999).expand(len(x))
        x = peer.step(network(x, told), t, x).prev_sample
    assert distance(ours(schedule, name, steps, sigmas=sigmas), x) < 1e-5


@pytest.mark.parametrize("name", ZERO_SNR_PEERS)
def test_guided_sampling_equals_diffusers(name):
    schedule = Schedule("v_prediction", **COSINE_ZERO_SNR, spacing="trailing")

    class Shift(torch.Tensor):
        @property
        def inputs(self):
            return {"cond": self.as_subclass(torch.Tensor)}

        @classmethod
        def cat(cls, parts):
            return torch.cat([part.as_subclass(torch.Tensor) for part in parts]).as_subclass(cls)

    def conditional(x, timesteps, cond):
        return network(x, timesteps, cond.view(-1, 1, 1, 1).double())

    def guided(x, timesteps):
        u, c = (network(x, timesteps, shift) for shift in (-0.5, 0.5))
        return u + 4.0 * (c - u)

    cond, uncond = (torch.full((len(NOISE),), shift).as_subclass(Shift) for shift in (0.5, -0.5))
    peer = PEERS[name].from_config(write_scheduler(schedule), **OWN.get(name, {}))
    sigmas = schedule.sigmas(20, name)
    denoise = guided_denoiser(conditional, cond, uncond, Guidance(scale=4.0), schedule, sigmas)
    result = ours(schedule, name, 20, denoise=denoise)
    assert distance(result, theirs(peer, 20, guided, **seeded(name))) < ROUNDING.get(name, 1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_the_same_bits_in_every_batch(name):
    """Sampler, noise and start alone; the denoiser here is elementwise, as the network's rows are made to be."""

    def denoise(x, sigma):
        return (x * 0.37 / (1 + sigma.view(-1, 1, 1, 1))).clamp(-1, 1) + x * 1e-3

    schedule = schedules_of(name)[-1]
    sigmas, shape = schedule.sigmas(6, name), (4, 3, 5)

    def draw(seeds):
        noise = Noise(seeds, shape, torch.device("cpu"))
        return SAMPLERS[name](denoise, schedule.initial(noise(), sigmas, name), sigmas, noise)

    seeds = [11, 0, 7, 7, 3, 2**40, *range(100, 111)]
    alone = torch.cat([draw([seed]) for seed in seeds])
    for size in (2, 3, 8, 17):
        assert torch.equal(torch.cat([draw(seeds[i : i + size]) for i in range(0, len(seeds), size)]), alone)
    assert torch.equal(draw(seeds[::-1]).flip(0), alone)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_keeps_nothing_and_changes_no_argument(name):
    schedule = schedules_of(name)[-1]
    sigmas = schedule.sigmas(6, name)
    x, denoise = schedule.initial(NOISE, sigmas, name), denoiser(network, schedule)
    start, levels = x.clone(), sigmas.clone()
    once = SAMPLERS[name](denoise, x, sigmas, draws())
    assert torch.equal(x, start) and torch.equal(sigmas, levels)
    assert torch.equal(once, SAMPLERS[name](denoise, x, sigmas, draws()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step_and_no_gradient_is_kept(name):
    schedule = Schedule("flow") if name == "heun_flow" else Schedule(**SD, spacing="trailing", set_alpha_to_one=True)
    sigmas = schedule.sigmas(5, name)
    weight = torch.tensor(1.0, requires_grad=True)
    seen = []
    denoise = denoiser(lambda x, t: network(x, t) * weight, schedule)
    options = {"noise": draws(), "callback": lambda *step: seen.append(step)}
    result = sample(denoise, schedule, sigmas, NOISE, name, **options)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    last = seen[-1][1]
    if name == "tcd":  # which ends at timestep 0, in the network's scale
        assert torch.allclose(last / (1 + schedule.sigmas_all[0] ** 2).sqrt(), result, rtol=1e-6)
    else:
        assert torch.equal(last, result)
    if name not in ("lms", "tcd"):  # the one looks back in its last step too, the other ends in noise of timestep 0
        assert torch.allclose(seen[-1][2], result, atol=1e-6)
    assert not result.requires_grad
