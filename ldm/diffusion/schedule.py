"""Noise schedules: timesteps, sigmas, spacings, and the scale of the first noise.

Everything above this file describes noise as x = x0 + sigma * noise, with sigma from 0 upwards.
What a network was trained on is x_t = alpha * x0 + sigma_t * noise; alpha = 1 / sqrt(1 + sigma^2) for the beta
schedules ("variance preserving") and alpha = 1 - t, sigma = t / (1 - t) for flow. Only this file and `denoiser.py`
know the second description.

T number of training timesteps   n number of sampling steps   B batch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ldm.diffusion.spacings import (
    DISTILLED,
    LCM_STEPS,
    MULTISTEP,
    SCHEDULE_SPACINGS,
    SIGMA_SPACINGS,
    SPACINGS,
    WHOLE,
    lcm_timesteps,
)
from ldm.errors import ConfigError, nearest

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
CAPPED_ALPHAS_CUMPROD = 2.0**-24  # stands for zero at zero terminal SNR, so that sigma is 4096 and not infinite
DDIM_INFINITY = 2.0**20  # DDPM, DDIM and LCM have no sigma = infinity in a denominator: 4096 would show (2.4e-4)
EDGE = 1e-4  # of one timestep: more than fp32 loses between t and sigma
FLOW_CAP = 0.999999  # largest flow time that is turned into a sigma; sampling starts at 1 - 1/T, as in diffusers

BETAS: dict[str, Callable[[int, float, float], torch.Tensor]] = {}


def _betas(function: Callable) -> Callable:
    BETAS[function.__name__] = function
    return function


# Betas: (T, beta_start, beta_end) -> (T,) fp32. In fp32 throughout, because published models were: at the ends of the
# schedule 1 - alphas_cumprod keeps only three digits, and float64 would give other sigmas than they were trained with.
@_betas
def linear(steps: int, start: float, end: float) -> torch.Tensor:
    """Betas on a straight line (DDPM, Ho et al. 2020)."""
    return torch.linspace(start, end, steps, dtype=torch.float32)


@_betas
def scaled_linear(steps: int, start: float, end: float) -> torch.Tensor:
    """Square roots of the betas on a straight line (latent diffusion, Rombach et al. 2022)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2


@_betas
def squaredcos_cap_v2(steps: int, start: float, end: float) -> torch.Tensor:
    """Cosine alphas_cumprod, betas capped at 0.999 (Nichol & Dhariwal 2021); start and end are not used."""

    def alphas_cumprod(i: int) -> float:
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alphas_cumprod(i + 1) / alphas_cumprod(i), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float32)


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas (T,) changed so that nothing of the image is left at the last step (Lin et al. 2024, algorithm 1)."""
    root = (1.0 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    product = root**2
    return 1 - torch.cat([product[:1], product[1:] / product[:-1]])


def shifted(t: Any, shift: float) -> Any:
    """Flow times t moved towards the noise (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class SizeShift:
    """The logarithm of the shift is linear in an image's tokens (FLUX); or, where `linear`, the shift itself."""

    tokens: int = 256
    shift: float = 0.5  # of images with so many tokens
    most_tokens: int = 4096
    most_shift: float = 1.15
    linear: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.tokens < self.most_tokens or not math.isfinite(self.shift + self.most_shift):
            raise ConfigError(f"the shift by an image's size is not possible: {self}")

    def at(self, tokens: int) -> float:
        slope = (self.most_shift - self.shift) / (self.most_tokens - self.tokens)
        mu = self.shift + slope * (tokens - self.tokens)
        return mu if self.linear else math.exp(mu)


def _exact(numbers: Any) -> torch.Tensor:
    """A number, a list of them or a tensor in float64 on the CPU; brought there first, for MPS has no float64."""
    numbers = numbers.cpu() if isinstance(numbers, torch.Tensor) else numbers
    return torch.as_tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Schedule:
    """How much noise a model was trained with at each timestep, and which sigmas a sampler visits.

    Raises ConfigError for unknown names, numbers out of range and settings that contradict each other.
    """

    prediction_type: str = "epsilon"  # what the network's output means: epsilon, v_prediction, sample, flow
    beta_schedule: str = "scaled_linear"  # linear, scaled_linear, squaredcos_cap_v2; not used by flow
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    rescale_betas_zero_snr: bool = False  # pure noise at the last timestep; wants trailing spacing
    spacing: str = "leading"  # leading, linspace, trailing; not used by flow
    steps_offset: int = 1  # added to leading timesteps; diffusers' pipelines expect 1 whatever the spacing
    flow_shift: float = 1.0  # > 1 spends more of the steps at high noise (Esser et al. 2024)
    whole_timesteps: bool = True  # flow: networks are told whole numbers; False: T t itself, from t = 1 on (SD3, FLUX)
    size_shift: SizeShift | None = None  # in place of flow_shift where the image's size decides (FLUX)
    set_alpha_to_one: bool = False  # DDIM's last sigma: 0, or (Stable Diffusion) the sigma of timestep 0

    def __post_init__(self) -> None:
        names = {"prediction_type": PREDICTION_TYPES, "beta_schedule": BETAS, "spacing": SCHEDULE_SPACINGS}
        for field, known in names.items():
            if (value := getattr(self, field)) not in known:
                raise ConfigError(f"unknown {field} '{value}'", where="schedule", hint=nearest(str(value), known))
        if self.num_train_timesteps < 2:
            raise ConfigError(f"num_train_timesteps must be at least 2, not {self.num_train_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(f"betas must rise inside (0, 1), not from {self.beta_start} to {self.beta_end}")
        if self.steps_offset < 0:
            raise ConfigError(f"steps_offset must not be negative, but is {self.steps_offset}")
        if not 0 < self.flow_shift < math.inf:
            raise ConfigError(f"flow_shift must be a positive number, not {self.flow_shift}")
        if self.is_flow and self.rescale_betas_zero_snr:
            raise ConfigError("rescale_betas_zero_snr does not go with flow, whose last step is pure noise already")
        if not self.is_flow and (self.flow_shift != 1 or self.size_shift or not self.whole_timesteps):
            raise ConfigError(f"flow_shift goes with prediction_type flow only, not with {self.prediction_type}")

    @property
    def is_flow(self) -> bool:
        """Whether x_t = (1 - t) x0 + t noise (flow) instead of alphas_cumprod from betas."""
        return self.prediction_type == "flow"

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """(T,) fp32, as training uses them: the last one is exactly 0 at zero terminal SNR. Not for flow."""
        betas = BETAS[self.beta_schedule](self.num_train_timesteps, self.beta_start, self.beta_end)
        if self.rescale_betas_zero_snr:
            betas = zero_terminal_snr(betas)
        return (1.0 - betas).cumprod(0)

    @cached_property
    def sigmas_all(self) -> torch.Tensor:
        """(T,) fp32, ascending: sigma of each training timestep (for flow of t = 1/T … 1 - 1/T), always finite."""
        if self.is_flow:
            total = self.num_train_timesteps
            return self.sigma(torch.linspace(1, total - 1, total, dtype=torch.float64))
        product = self.alphas_cumprod.clone()
        if self.rescale_betas_zero_snr:
            product[-1] = CAPPED_ALPHAS_CUMPROD
        return ((1 - product) / product).sqrt()

    def alpha_sigma(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) factors of x_t = alpha * x0 + sigma * noise, for (B,) integer timesteps or flow times in (0, 1)."""
        if timesteps.is_floating_point() != self.is_flow:
            raise TypeError(f"timesteps are {timesteps.dtype}: flow takes floats in (0, 1), betas take integers")
        if self.is_flow:
            t = timesteps.float()
            return 1 - t, t
        product = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return product.sqrt(), (1 - product).sqrt()

    def network_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network is told, (B,) fp32: integer timesteps as they are, flow times t as T t, whole or exact."""
        if not self.is_flow:
            return timesteps.float()
        if not self.whole_timesteps:
            t = timesteps.double()
            return (torch.where(t > FLOW_CAP - 1e-7, 1.0, t) * self.num_train_timesteps).float()
        # rounded down as DPMSolverMultistepScheduler does it, to be asked the same
        return (timesteps * self.num_train_timesteps + EDGE).floor().float()

    def timestep(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The timestep that a network is told for a sigma (any shape), fp32; between table entries linear in sigma."""
        sigma = _exact(sigma)
        if self.is_flow:
            return self.network_timesteps(sigma / (1 + sigma))
        table = self.sigmas_all.double()
        sigma = sigma.clamp(table[0], table[-1])
        low = (torch.searchsorted(table, sigma.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        return (low + (sigma - table[low]) / (table[low + 1] - table[low])).float()

    def sigma(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """The sigma of a timestep in [0, T - 1] (for flow: t * T), fp32, any shape; fractions are interpolated."""
        timestep = _exact(timestep)
        if self.is_flow:
            t = (timestep / self.num_train_timesteps).clamp(max=FLOW_CAP)
            return (t / (1 - t)).float()
        table = self.sigmas_all.double().numpy()
        return torch.as_tensor(np.interp(timestep.numpy(), np.arange(len(table)), table)).float()

    def earlier(self, sigmas: torch.Tensor, gamma: float) -> torch.Tensor:
        """The sigmas of timesteps (1 - gamma) t rounded down, for those of timesteps t; none is above its own."""
        timesteps = ((1 - gamma) * self.timestep(sigmas).double().round()).floor()
        return torch.minimum(self.sigma(timesteps), sigmas)

    def sigmas(
        self, num_inference_steps: int, sampler: str = "euler", spacing: str | None = None, tokens: int | None = None
    ) -> torch.Tensor:
        """(n + 1,) fp32 on the CPU, descending, as `sampler` of diffusers would visit them; the last one is 0, for
        TCD and for DDIM without set_alpha_to_one the sigma of timestep 0. spacing None is the schedule's own, for lcm
        and tcd their table. `tokens`: of the image, where a transformer's shift depends on its size.

        Raises ConfigError for a step count that is not possible, and a spacing that is unknown or does not fit.
        """
        n = num_inference_steps
        if n < 1:
            raise ConfigError(f"num_inference_steps must be at least 1, not {n}")
        if self.is_flow and spacing is not None:
            raise ConfigError(f"spacing '{spacing}' does not apply: a flow model has its own", hint="leave it out")
        if self.is_flow and not self.whole_timesteps:
            return self._transformer_sigmas(n, tokens)
        return self._flow_sigmas(n, sampler) if self.is_flow else self._beta_sigmas(n, sampler, spacing)

    def _beta_sigmas(self, n: int, sampler: str, spacing: str | None) -> torch.Tensor:
        if spacing in SIGMA_SPACINGS:
            low, high = self.sigmas_all[0].item(), self.sigmas_all[-1].item()
            sigmas = torch.from_numpy(SPACINGS[spacing](low, high, n)).float()
            return self._checked(torch.cat([sigmas, sigmas.new_zeros(1)]), f"{n} steps are too many for {spacing}")
        return self._at_timesteps(self._spaced(n, sampler, spacing), sampler)

    def given(
        self, sampler: str = "euler", timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> torch.Tensor:
        """(n + 1,) fp32, as `sigmas` gives them, of timesteps in [0, T - 1] or of sigmas (one of the two), descending.

        Sigmas may end in 0; for flow both are times, timesteps in (0, T] and sigmas in (0, 1], as in diffusers.
        Raises ConfigError naming the list and what is wrong with it.
        """
        where = "timesteps" if sigmas is None else "sigmas"
        if (timesteps is None) == (sigmas is None):
            raise ConfigError("give either timesteps or sigmas", where=where)
        try:
            values = _exact(timesteps if sigmas is None else sigmas)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError("expected a list of numbers", where=where) from error
        total = self.num_train_timesteps
        if sigmas is not None and values.ndim == 1 and len(values) > 1 and values[-1] == 0:
            values = values[:-1]
        if values.ndim != 1 or not 1 <= len(values) <= total or not values.isfinite().all():
            raise ConfigError(f"expected a list of 1 to {total} finite numbers", where=where)
        if sigmas is None:
            most: float = total if self.is_flow else total - 1
        else:
            most = 1.0 if self.is_flow else self.sigmas_all[-1].item() * 1.01  # published tables are rounded
        least_fits = values[-1] > 0 or (values[-1] == 0 and sigmas is None and not self.is_flow)
        if values[0] > most or not least_fits:
            raise ConfigError(f"{values.min():g} to {values.max():g} is not inside 0 to {most:g}", where=where)
        if (values.diff() >= 0).any():
            raise ConfigError("each has to be lower than the one before", where=where)
        if self.is_flow:
            result = self.sigma(values if sigmas is None else values * total)
        elif sigmas is None:
            return self._at_timesteps(values, sampler)
        else:
            result = values.float()
        return self._checked(torch.cat([result, result.new_zeros(1)]), f"{where}: two are too close together")

    def _at_timesteps(self, timesteps: torch.Tensor, sampler: str) -> torch.Tensor:
        sigmas = self.sigma(timesteps)
        last = 0.0
        if sampler in WHOLE and self.rescale_betas_zero_snr and self.prediction_type != "epsilon":
            sigmas[timesteps == self.num_train_timesteps - 1] = DDIM_INFINITY
        if sampler == "tcd" or (sampler == "ddim" and not self.set_alpha_to_one):
            last = float(self.sigmas_all[0])
        return torch.cat([sigmas, sigmas.new_tensor([last])])

    def _checked(self, sigmas: torch.Tensor, fault: str) -> torch.Tensor:
        if (sigmas.diff() >= 0).any():
            raise ConfigError(fault)
        return sigmas

    def _spaced(self, n: int, sampler: str, spacing: str | None) -> torch.Tensor:
        total = self.num_train_timesteps
        if spacing is None and sampler in DISTILLED:
            if n > LCM_STEPS or total < LCM_STEPS:
                what = f"{sampler} has {LCM_STEPS} steps of its own, not {n}"
                raise ConfigError(what, hint="choose fewer, or a spacing")
            return torch.from_numpy(lcm_timesteps(total, n))
        name = self.spacing if spacing is None else spacing
        if name not in SPACINGS:
            raise ConfigError(f"unknown spacing '{name}'", hint=nearest(name, SPACINGS))
        timesteps = SPACINGS[name](total, n, self.steps_offset, sampler) if n <= total else np.empty(0)
        if len(timesteps) != n or timesteps[0] > total - 1 or (np.diff(timesteps) >= 0).any():
            raise ConfigError(f"{n} steps are too many for {total} training timesteps with {name} spacing")
        return torch.tensor(timesteps.tolist(), dtype=torch.float64)

    def _flow_sigmas(self, n: int, sampler: str) -> torch.Tensor:
        """Equal steps of t from 1 - 1/T to 0 (for UniPC from 1 to 1/T, then 0), shifted, as t / (1 - t)."""
        total = self.num_train_timesteps
        if sampler == "unipc":
            t = np.append(np.linspace(1, 1 / total, n + 1)[:-1], 0.0)
        else:
            t = (1.0 - np.linspace(1, 1 / total, n + 1))[::-1]
        t = shifted(t, self.flow_shift).clip(max=FLOW_CAP)
        edge = np.floor(t * total) + 1  # near it, diffusers rounds down by chance: moved away, by 2e-7 in t
        t = np.where(edge - t * total < 2 * EDGE, (edge - 2 * EDGE) / total, t)
        return torch.from_numpy(t / (1 - t)).float()

    def _transformer_sigmas(self, n: int, tokens: int | None) -> torch.Tensor:
        """Of SD3 ("linspace": equal steps of t from 1 to its shifted 1/T) and FLUX ("trailing": from 1 to 1/n), then
        shifted, then 0, as t / (1 - t)."""
        shift = self.shift_at(tokens)
        last = 1 / self.num_train_timesteps
        if self.spacing == "trailing":
            last = 1 / n
        elif self.size_shift is None:
            last = shifted(last, shift)  # and once more below, as FlowMatchEulerDiscreteScheduler does
        t = np.append(shifted(np.linspace(1, last, n), shift), 0.0).clip(max=FLOW_CAP)
        return torch.from_numpy(t / (1 - t)).float()

    def shift_at(self, tokens: int | None) -> float:
        """The shift of flow's times for an image of so many tokens; None: of as many as size_shift's largest."""
        if self.size_shift is None:
            return self.flow_shift
        return self.size_shift.at(self.size_shift.most_tokens if tokens is None else tokens)

    def initial(
        self, noise: torch.Tensor, sigmas: torch.Tensor, sampler: str = "euler", spacing: str | None = None
    ) -> torch.Tensor:
        """Unit noise (B, C, H, W) scaled to the x that sampling starts from. Euler and its relatives take sigma itself
        with any spacing but leading; all else the scale at which the network's input is the noise unchanged."""
        sigma = sigmas[0].item()
        if self.is_flow:
            return noise * (sigma + 1)
        unit = sampler in MULTISTEP or sampler in WHOLE or (spacing or self.spacing) == "leading"
        return noise * (math.sqrt(sigma**2 + 1) if unit else sigma)
