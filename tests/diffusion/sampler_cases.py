"""What the tests of samplers share: a toy network, diffusers' schedulers by our names, and how both are run."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm.diffusion.denoiser import consistency, denoiser
from ldm.diffusion.samplers import SAMPLERS

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE_ZERO_SNR = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}
PEERS = {  # without a peer: dpmpp_2s_ancestral, and dpmpp_3m_sde, whose peer has a sign wrong
    "euler": EulerDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm2": KDPM2DiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "lms": LMSDiscreteScheduler,
    "ddpm": DDPMScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "dpmpp_sde": DPMSolverSDEScheduler,
    "lcm": LCMScheduler,
}
OWN = {  # what makes each peer the sampler of that name
    "ddim": {"clip_sample": False},
    "ddpm": {"clip_sample": False},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}
DRAWS = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm")  # whose step takes a generator and draws once
EPSILON_AND_V = ("dpm2", "dpmpp_sde", "euler_ancestral")  # whose peers know no prediction_type "sample"

# A toy network: random, nonlinear, dependent on picture, timestep and condition, computed in float64.
generator = torch.Generator().manual_seed(1)
W_IN, W_OUT = (torch.randn(*size, generator=generator, dtype=torch.float64) * 0.7 for size in ((4, 16), (16, 4)))
FREQUENCIES = torch.randn(16, generator=generator, dtype=torch.float64) / 100
NOISE = torch.randn(2, 4, 6, 5, generator=generator)

S = 0.6  # standard deviation of the Gaussian data whose best denoiser is linear


def network(x, timesteps, shift=0.0):
    hidden = torch.einsum("bchw,cd->bdhw", x.double(), W_IN) + shift
    hidden = hidden + torch.sin(FREQUENCIES * timesteps.double().view(-1, 1))[:, :, None, None]
    return torch.einsum("bdhw,dc->bchw", hidden.tanh(), W_OUT).to(x.dtype)


def gaussian(x, sigma):
    return (S**2 / (S**2 + sigma.view(-1, 1, 1, 1) ** 2)).to(x.dtype) * x


def draws(shape=NOISE.shape, seed=7):
    """noise(i) of a generator that is drawn from once a call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(shape, generator=generator)


def ours(schedule, name, steps, predict=network, sigmas=None, noise=None, spacing=None, denoise=None, **options):
    sigmas = schedule.sigmas(steps, name, spacing) if sigmas is None else sigmas
    denoise = denoise or denoiser(predict, schedule)
    denoise = consistency(denoise, schedule) if name == "lcm" else denoise
    x = schedule.initial(NOISE, sigmas, name, spacing)
    return SAMPLERS[name](denoise, x, sigmas, noise or draws(), **options)


def theirs(peer, steps, predict=network, **options):
    """diffusers' loop; `options` go to each step."""
    peer.set_timesteps(steps)
    x = NOISE * peer.init_noise_sigma
    for t in peer.timesteps:
        raw = predict(peer.scale_model_input(x, t), t.float().expand(len(x)))
        x = peer.step(raw, t, x, **options).prev_sample
    return x


def seeded(name):
    """The options of a step of that peer that make it draw what draws() draws."""
    return {"generator": torch.Generator().manual_seed(7)} if name in DRAWS else {}


def build_peer(name, **config):
    return PEERS[name](**config, **OWN.get(name, {}))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()
