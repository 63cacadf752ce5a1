"""Samplers that add noise: their exact linear recursions under the Gaussian denoiser, and diffusers' with our noise."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, DPMSolverSDEScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from sampler_cases import LINEAR, NOISE, SD, S, distance, ours, theirs

from ldm.diffusion.names import ETA
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule

MEAN = 0.4  # of the data; S is its standard deviation
SIGMAS = [9.0, 5.0, 2.5, 1.2, 0.5, 0.2, 0.05]  # uneven in log sigma on purpose


# Each recursion below is the sampler of that name as its paper or k-diffusion writes it, on linear forms: a quantity
# is the vector of its coefficients of (1, the starting noise, one independent unit normal a further entry).
class Forms:
    """Linear forms with the denoiser of normal data, which is affine in x."""

    def __init__(self, sigmas):
        self.unit = np.eye(2 + 2 * len(sigmas))
        self.start = sigmas[0] * self.unit[1]
        self.used = 2

    def denoise(self, x, sigma):
        return MEAN * self.unit[0] + S**2 / (S**2 + sigma**2) * (x - MEAN * self.unit[0])

    def draw(self):
        self.used += 1
        return self.unit[self.used - 1]


def up_and_down(sigma, to, eta):
    up = min(to, eta * (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5)
    return up, (to**2 - up**2) ** 0.5


def recurse_ddpm(f, sigmas, eta):
    """In the paper's alphas: posterior mean and variance of x_(t-1), for x_t in the network's scale."""
    x = f.start / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, to in pairwise(sigmas):
        product, before = 1 / (1 + sigma**2), 1 / (1 + to**2)
        alpha = product / before
        x0 = f.denoise(x / math.sqrt(product), sigma)
        mean = math.sqrt(before) * (1 - alpha) / (1 - product) * x0
        mean = mean + math.sqrt(alpha) * (1 - before) / (1 - product) * x
        x = mean + math.sqrt((1 - before) / (1 - product) * (1 - alpha)) * f.draw()
    return x * math.sqrt(1 + sigmas[-1] ** 2)


def recurse_ddim(f, sigmas, eta):
    """Song et al. 2021, eq. 12 and 16."""
    x = f.start / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, to in pairwise(sigmas):
        product, before = 1 / (1 + sigma**2), 1 / (1 + to**2)
        x0 = f.denoise(x / math.sqrt(product), sigma)
        direction = (x - math.sqrt(product) * x0) / math.sqrt(1 - product)
        deviation = eta * math.sqrt((1 - before) / (1 - product)) * math.sqrt(1 - product / before)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before - deviation**2) * direction + deviation * f.draw()
    return x


def recurse_euler_ancestral(f, sigmas, eta):
    x = f.start
    for sigma, to in pairwise(sigmas):
        up, down = up_and_down(sigma, to, eta)
        x = x + (x - f.denoise(x, sigma)) / sigma * (down - sigma) + up * f.draw()
    return x


def recurse_dpmpp_2s_ancestral(f, sigmas, eta):
    x = f.start
    for sigma, to in pairwise(sigmas):
        up, down = up_and_down(sigma, to, eta)
        x0 = f.denoise(x, sigma)
        if down == 0:
            x = x0
        else:
            h = math.log(sigma) - math.log(down)
            half = math.exp(-(-math.log(sigma) + h / 2))
            x0 = f.denoise(half / sigma * x - math.expm1(-h / 2) * x0, half)
            x = down / sigma * x - math.expm1(-h) * x0
        x = x + up * f.draw()
    return x


def recurse_dpmpp_sde(f, sigmas, eta):
    """A Brownian path over sigma: its increment over [sigma, half] is part of that over [sigma, to]."""
    x = f.start
    for sigma, to in pairwise(sigmas):
        x0 = f.denoise(x, sigma)
        if to == 0:
            x = x0
            continue
        half = math.exp((math.log(sigma) + math.log(to)) / 2)
        first = math.sqrt(sigma - half) * f.draw()
        whole = first + math.sqrt(half - to) * f.draw()
        up, down = up_and_down(sigma, half, eta)
        x_half = down / sigma * x - math.expm1(math.log(down / sigma)) * x0 + up * first / math.sqrt(sigma - half)
        x0 = f.denoise(x_half, half)
        up, down = up_and_down(sigma, to, eta)
        x = down / sigma * x - math.expm1(math.log(down / sigma)) * x0 + up * whole / math.sqrt(sigma - to)
    return x


def recurse_tcd(f, sigmas, eta):
    """Zheng et al. 2024 in the network's scale: to (1 - eta) of the next sigma, and noise up to it but at the end."""
    x = f.start / math.sqrt(1 + sigmas[0] ** 2)
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        product, before, lower = (1 / (1 + one**2) for one in (sigma, to, (1 - eta) * to))
        x0 = f.denoise(x / math.sqrt(product), sigma)
        epsilon = (x - math.sqrt(product) * x0) / math.sqrt(1 - product)
        x = math.sqrt(lower) * x0 + math.sqrt(1 - lower) * epsilon
        if i < len(sigmas) - 2:
            x = math.sqrt(before / lower) * x + math.sqrt(1 - before / lower) * f.draw()
    return x


def recurse_multistep(f, sigmas, eta, order):
    """k-diffusion's dpmpp_2m_sde (midpoint) and dpmpp_3m_sde."""
    x, old, hs = f.start, [], []
    for sigma, to in pairwise(sigmas):
        x0 = f.denoise(x, sigma)
        if to == 0:
            x = x0
            continue
        h = math.log(sigma / to)
        h_eta = h * (1 + eta)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * x0
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if order == 2 and old:
            x = x - 0.5 * math.expm1(-h_eta) * (h / hs[-1]) * (x0 - old[-1])
        elif order == 3 and len(old) > 1:
            r0, r1 = hs[-1] / h, hs[-2] / h
            d1_0, d1_1 = (x0 - old[-1]) / r0, (old[-1] - old[-2]) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif order == 3 and old:
            x = x + phi_2 * (x0 - old[-1]) / (hs[-1] / h)
        x = x + to * math.sqrt(-math.expm1(-2 * h * eta)) * f.draw()
        old, hs = [*old, x0], [*hs, h]
    return x


RECURSIONS = {  # a new stochastic sampler states its recursion here
    "ddpm": recurse_ddpm,
    "ddim": recurse_ddim,
    "euler_ancestral": recurse_euler_ancestral,
    "tcd": recurse_tcd,
    "dpmpp_2s_ancestral": recurse_dpmpp_2s_ancestral,
    "dpmpp_sde": recurse_dpmpp_sde,
    "dpmpp_2m_sde": lambda f, sigmas, eta: recurse_multistep(f, sigmas, eta, 2),
    "dpmpp_3m_sde": lambda f, sigmas, eta: recurse_multistep(f, sigmas, eta, 3),
}
CASES = [("ddpm", None), *((name, eta) for name in ETA for eta in (0.6, 1.0))]


def moments(name, eta, sigmas):
    """(mean, variance) of the recursion's end."""
    end = RECURSIONS[name](Forms(sigmas), sigmas, eta)
    return end[0], (end[1:] ** 2).sum()


def denoise(x, sigma):
    return MEAN + (S**2 / (S**2 + sigma.view(-1, 1, 1, 1).to(x.dtype) ** 2)) * (x - MEAN)


def sample(name, eta, sigmas, start, noise):
    options = {} if eta is None else {"eta": eta}
    return SAMPLERS[name](denoise, start * sigmas[0], torch.tensor(sigmas, dtype=torch.float64), noise, **options)


def coefficients(name, eta, sigmas):
    """(mean, variance) of the sampler's end: row r of the batch is given one unit of the r-th source of noise alone."""
    rows = 2 + 2 * len(sigmas)
    unit, drawn = torch.eye(rows, dtype=torch.float64).view(rows, rows, 1, 1, 1), []

    def noise(i):
        drawn.append(i)
        return unit[len(drawn) + 1]

    end = sample(name, eta, sigmas, unit[1], noise).flatten()
    assert drawn == list(range(len(drawn))) and len(drawn) <= rows - 2
    return end[0].item(), ((end[1:] - end[0]) ** 2).sum().item()


def test_every_stochastic_sampler_states_its_recursion():
    assert set(RECURSIONS) == {*ETA, "ddpm"} and set(RECURSIONS) <= set(SAMPLERS)


@pytest.mark.parametrize("last", [[], [0.0]], ids=["to sigma 0.05", "to 0"])
@pytest.mark.parametrize("name, eta", CASES)
def test_each_is_its_own_exact_linear_recursion(name, eta, last):
    sigmas = [*SIGMAS, *last]
    assert coefficients(name, eta, sigmas) == pytest.approx(moments(name, eta, sigmas), rel=1e-9)


@pytest.mark.parametrize("name, eta", CASES)
def test_mean_and_variance_of_100_000_samples(name, eta):
    count, sigmas = 100_000, [*SIGMAS, 0.0]
    generator = torch.Generator().manual_seed(3)

    def noise(i):
        return torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)

    x = sample(name, eta, sigmas, noise(0), noise)
    mean, variance = moments(name, eta, sigmas)
    assert abs(x.mean().item() - mean) / math.sqrt(variance / count) <= 4
    assert abs(x.var().item() / variance - 1) / math.sqrt(2 / count) <= 4


# Not tcd: below the next sigma it goes in one step however many there are, as a distilled network can.
@pytest.mark.parametrize("name, eta", [case for case in CASES if case[0] != "tcd"])
def test_the_variance_converges_to_that_of_the_data(name, eta):
    errors = []
    for steps in (20, 40, 80, 160):
        sigmas = torch.linspace(math.log(20), math.log(0.02), steps, dtype=torch.float64).exp().tolist()
        mean, variance = coefficients(name, eta, [*sigmas, 0.0])
        errors.append(abs(variance / S**2 - 1))
    assert errors[-1] < errors[0] / 4 and errors[-1] < 0.05
    assert mean == pytest.approx(MEAN, rel=0.01)


# diffusers draws the noise of DPM++ SDE from a Brownian path over sigma, which torchsde builds as a tree.
@pytest.mark.filterwarnings("ignore:Should have")  # of torchsde, about the last bit of an interval's end
@pytest.mark.parametrize("prediction_type, betas", [("epsilon", SD), ("v_prediction", LINEAR)])
def test_dpmpp_sde_equals_diffusers_on_the_same_brownian_path(prediction_type, betas):
    config = {**betas, "prediction_type": prediction_type, "steps_offset": 1}
    schedule, steps = Schedule(**config, spacing="trailing"), 6
    peer = DPMSolverSDEScheduler(**config, timestep_spacing="trailing", noise_sampler_seed=5)
    sigmas = schedule.sigmas(steps, "dpmpp_sde")
    path = BrownianTreeNoiseSampler(NOISE, sigmas[-2].item(), sigmas[0].item(), 5)
    middles = (sigmas[:-2].log() + sigmas[1:-1].log()).div(2).exp()
    ends = [end for sigma, middle, to in zip(sigmas, middles, sigmas[1:]) for end in ((sigma, middle), (middle, to))]
    result = ours(schedule, "dpmpp_sde", steps, noise=lambda i: path(*ends[i]))
    assert distance(result, theirs(peer, steps)) < 2e-4  # the tree's path is exact to 1e-6, in steps of 0.3 sigma


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_ddim_equals_diffusers(eta):
    config = {**SD, "steps_offset": 1, "set_alpha_to_one": False}
    peer = DDIMScheduler(**config, clip_sample=False)
    generator = torch.Generator().manual_seed(7)
    expected = theirs(peer, 20, eta=eta, generator=generator)
    assert distance(ours(Schedule(**config), "ddim", 20, eta=eta), expected) < 1e-5


def test_noise_free_stochastic_samplers_ask_for_no_noise():
    sigmas = torch.tensor([*SIGMAS, 0.0])
    for name in ETA:
        x = SAMPLERS[name](denoise, NOISE * 9, sigmas, None, eta=0.0)
        assert x.isfinite().all()
    with_noise = SAMPLERS["dpmpp_2m_sde"](denoise, NOISE * 9, sigmas, None, eta=0.0)
    assert torch.allclose(with_noise, SAMPLERS["dpmpp_2m"](denoise, NOISE * 9, sigmas), atol=1e-6)


def one_step_error(stride):
    """(ours, diffusers') error of a third step's mean, over timesteps `stride` apart, for x0 = sin(2 lambda)."""
    timesteps = [600 - stride * i for i in range(5)]
    schedule = Schedule("sample", **SD)
    sigmas = schedule.sigma(torch.tensor(timesteps)).double()
    lambdas = [-math.log(sigma) for sigma in sigmas]

    def exact(x):  # of dx = ... from the second sigma to the third: Simpson's rule is enough by far
        h, n = lambdas[3] - lambdas[2], 200
        u = np.linspace(0, h, n + 1)
        weights = np.r_[1, np.tile([4, 2], n // 2 - 1), 4, 1] * h / n / 3
        return math.exp(-2 * h) * x + (weights * 2 * np.exp(-2 * (h - u)) * np.sin(2 * (lambdas[2] + u))).sum()

    def smooth(x, sigma):
        return torch.sin(-2 * sigma.log()).view(-1, 1, 1, 1)

    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    before, after = (
        SAMPLERS["dpmpp_3m_sde"](smooth, x, sigmas[:k], lambda i: torch.zeros_like(x)).item() for k in (3, 4)
    )
    mine = after - exact(before)
    peer = DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_order=3, prediction_type="sample")
    peer.set_timesteps(timesteps=timesteps)
    sample, ends = torch.zeros(1, 1, 1, 1), []
    for t, lamda in zip(peer.timesteps[:3], lambdas):
        output = torch.full((1, 1, 1, 1), math.sin(2 * lamda))
        sample = peer.step(output, t, sample, variance_noise=torch.zeros(1, 1, 1, 1)).prev_sample
        ends.append(sample.item())
    scaled = [end * math.sqrt(1 + sigma**2) for end, sigma in zip(ends, sigmas[1:].tolist())]
    return abs(mine), abs(scaled[2] - exact(scaled[1]))


def test_the_third_order_term_of_diffusers_has_the_wrong_sign():
    """One step's error falls by 4 where the step is halved, as without any third-order term; k-diffusion's by 8."""
    coarse, fine = one_step_error(10), one_step_error(5)
    assert coarse[0] / fine[0] == pytest.approx(8, rel=0.25)
    assert coarse[1] / fine[1] == pytest.approx(4, rel=0.25)
    assert fine[0] < fine[1] / 4
