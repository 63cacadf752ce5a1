"""Noise spacings: which noise levels a sampler with n steps visits. No torch here: --help lists them.

Some choose among the training timesteps: (total, n, offset, sampler) -> n descending timesteps in [0, total - 1],
float64. The families of samplers divide differently (as their namesakes in diffusers do): the multistep solvers of
DPM-Solver++ and UniPC cut n + 1 parts, DDPM, DDIM, LCM and TCD round to whole timesteps, Euler and all others neither.
The others place sigmas in the model's whole range: (lowest, highest, n) -> n descending sigmas, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ldm.errors import ConfigError

Spacing = Callable[..., np.ndarray]

SPACINGS: dict[str, Spacing] = {}
SIGMA_SPACINGS: list[str] = []  # those of SPACINGS that give sigmas
SCHEDULE_SPACINGS = ("leading", "linspace", "trailing")  # those that a model's own schedule may name (diffusers')
MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc")
WHOLE = ("ddpm", "ddim", "lcm", "tcd")
DISTILLED = ("lcm", "tcd")  # have timesteps of their own where no spacing is chosen
LCM_STEPS = 50  # timesteps that a consistency model is distilled on, by default (Luo et al. 2023)
SD_HIGHEST = 14.615  # sigma of Stable Diffusion's last timestep, which the tables of `ays` begin with


def spacing(function: Spacing) -> Spacing:
    """List a spacing of timesteps under its own name."""
    SPACINGS[function.__name__] = function
    return function


def sigma_spacing(function: Spacing) -> Spacing:
    """List a spacing of sigmas under its own name."""
    SIGMA_SPACINGS.append(function.__name__)
    return spacing(function)


@spacing
def leading(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Multiples of T // n, plus an offset (Stable Diffusion 1.x and 2.x use 1); never reaches the last timestep."""
    if sampler in MULTISTEP:
        return np.arange(n, 0, -1.0) * (total // (n + 1)) + offset
    return np.arange(n - 1, -1, -1.0) * (total // n) + offset


@spacing
def linspace(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Equal parts from T - 1 to 0, fractions included for Euler."""
    if sampler in MULTISTEP:
        return np.linspace(0, total - 1, n + 1).round()[:0:-1]
    if n == 1:
        return np.array([total - 1.0])
    steps = np.linspace(0, total - 1, n, dtype=np.float64 if sampler in WHOLE else np.float32)
    return (steps.round() if sampler in WHOLE else steps)[::-1].astype(np.float64)


@spacing
def trailing(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Steps of T / n down from T - 1, which is always the first: what zero terminal SNR needs."""
    return np.arange(total, 0, -total / n)[:n].round() - 1


@spacing
def sgm_uniform(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Equal parts from T - 1 to 0 with 0 left out, fractions included (Stability's sgm, A1111, ComfyUI)."""
    return np.linspace(total - 1, 0, n + 1)[:-1]


@spacing
def simple(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Every (T / n)-th timestep down from T - 1, rounded towards the start (A1111, ComfyUI)."""
    return total - 1.0 - np.floor(np.arange(n) * (total / n))


@sigma_spacing
def karras(low: float, high: float, n: int) -> np.ndarray:
    """Equal parts of sigma^(1/7) (Karras et al. 2022, eq. 5)."""
    ends = np.array([high, low]) ** (1 / 7)
    return (ends[0] + np.linspace(0, 1, n) * (ends[1] - ends[0])) ** 7


@sigma_spacing
def exponential(low: float, high: float, n: int) -> np.ndarray:
    """Equal parts of log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


@sigma_spacing
def beta(low: float, high: float, n: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6): dense at both ends (Lee et al. 2024)."""
    return low + _beta_quantile(1 - np.linspace(0, 1, n), 0.6) * (high - low)


def _beta_quantile(q: np.ndarray, a: float) -> np.ndarray:
    """The x with I_x(a, a) = q, by bisection of the incomplete beta function's series at x <= 1/2 (DLMF 8.17.7)."""
    k = np.arange(60)
    rising = np.cumprod(np.concatenate([[1.0], (k[:-1] + 1 - a) / (k[:-1] + 1)]))  # (1 - a)_k / k!
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    lower, upper = np.zeros_like(q), np.full_like(q, 0.5)
    tail = np.minimum(q, 1 - q)
    for _ in range(60):
        x = (lower + upper) / 2
        below = scale * x**a * (rising * x[:, None] ** k / (a + k)).sum(1) < tail
        lower, upper = np.where(below, x, lower), np.where(below, upper, x)
    x = np.where(tail == 0, 0.0, (lower + upper) / 2)
    return np.where(q > 0.5, 1 - x, x)


def _align_your_steps(table: tuple[float, ...], high: float, n: int) -> np.ndarray:
    if not 0.99 < high / SD_HIGHEST < 1.01:
        raise ConfigError(
            f"Align Your Steps was tuned for Stable Diffusion's noise, up to sigma {SD_HIGHEST}; "
            f"this model's reaches {high:.4g}",
            where="spacing",
            hint="use karras",
        )
    return np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(table)), np.log(table)))[:-1]


@sigma_spacing
def ays(low: float, high: float, n: int) -> np.ndarray:
    """Align Your Steps for Stable Diffusion 1.x (Sabour et al. 2024), log-linear between its ten steps."""
    table = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
    return _align_your_steps(table, high, n)


@sigma_spacing
def ays_xl(low: float, high: float, n: int) -> np.ndarray:
    """Align Your Steps for Stable Diffusion XL (Sabour et al. 2024), log-linear between its ten steps."""
    table = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
    return _align_your_steps(table, high, n)


def lcm_timesteps(total: int, n: int) -> np.ndarray:
    """n of the 50 timesteps that a consistency model was distilled on; for lcm and tcd where no spacing is chosen."""
    table = np.arange(LCM_STEPS, 0, -1.0) * (total // LCM_STEPS) - 1
    return table[np.floor(np.linspace(0, LCM_STEPS, n, endpoint=False)).astype(int)]
