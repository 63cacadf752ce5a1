"""A network under guidance as denoise(x, sigma): its conditions are bound, and its answers with them combined.

A condition is any object with a length (one row an image), a classmethod cat([...]), and `inputs`: the keywords that
the network gets of it. ldm.nn.text.Conditioning is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.device import sent
from ldm.diffusion.denoiser import Denoise, precondition
from ldm.diffusion.guidance.settings import Guidance
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError


def guided_denoiser(
    network: Callable[..., Tensor],
    cond: Any | Callable[[int], Any],
    uncond: Any | Callable[[int], Any] | None,
    guidance: Guidance,
    schedule: Schedule,
    sigmas: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Denoise:
    """The network as denoise(x (B, C, H, W), sigma (B,)) -> x0 (B, C, H, W) fp32, for one run over `sigmas` (n + 1,).

    network(x, timesteps, **condition.inputs) -> raw, in `dtype`. A condition may be a function of the step (from 0).
    Rows through the network: B with the prompt, B more where a scale is above 1, B more for PAG (with the keywords
    perturb=mask (B',) bool, True where self-attention is to be the identity, and perturb_in=layers), in the order u, c,
    p. Outside of the interval there are B rows, in steps of zero-init none where every scale is above 1, else B. Made
    for one run, with which APG's momentum begins. Raises ConfigError for scales that are neither one nor one an image,
    and for conditions that do not fit.
    """
    cond_at, uncond_at = (c if callable(c) else (lambda step, c=c: c) for c in (cond, uncond))
    weights = _weights(guidance.scale, cond_at(0), uncond_at(0))
    all_guided = bool((weights > 1).all())
    levels, skipped = sigmas[:-1].tolist(), zero_init(guidance, schedule) if guidance.kind == "cfg_zero" else 0
    parts = [part for part, used in (("u", (weights > 1).any()), ("c", True), ("p", guidance.pag_scale)) if used]
    combine: Callable[..., Tensor] = plain if guidance.kind == "cfg" and not guidance.rescale else Combination(guidance)
    joined: dict[str, Any] = {}

    def conditions(step: int) -> Any:
        now = {"u": uncond_at(step), "c": cond_at(step), "p": cond_at(step)}
        if any(joined.get(part) is not now[part] for part in parts):
            joined.update(now, all=type(now["c"]).cat([now[part] for part in parts]))
        return joined["all"]

    def per_image(x: Tensor) -> Tensor:
        if "w" not in joined:
            joined["w"] = sent(weights, x.device).expand(len(x)).view(-1, *[1] * (x.ndim - 1))
        return joined["w"]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, x_in, timesteps = precondition(schedule, x, sigma, dtype)
        level = float(sigma[0])  # on the CPU: no wait for the device
        step = step_at(level, levels)
        alone = len(parts) == 1 or not guidance.applies(step, len(levels), level)
        zeroed = not alone and step < skipped  # where the scale is above 1
        if zeroed and all_guided:
            raw = torch.zeros_like(x, dtype=torch.float32)
        elif alone or zeroed:
            raw = network(x_in, timesteps, **cond_at(step).inputs).float()
            raw = torch.where(per_image(x) > 1, 0.0, raw) if zeroed else raw
        else:
            perturbed = _perturbed(guidance, x, len(parts)) if "p" in parts else {}
            repeated = (torch.cat([one] * len(parts)) for one in (x_in, timesteps))
            raw = network(*repeated, **conditions(step).inputs, **perturbed).float()
            raw = combine(w=per_image(x), **dict(zip(parts, raw.chunk(len(parts)))))
        return c_skip * x + c_out * raw

    return denoise


def _perturbed(guidance: Guidance, x: Tensor, parts: int) -> dict[str, Any]:
    """The network's keywords for PAG, whose rows are the last."""
    rows = torch.arange(parts * len(x), device=x.device) >= (parts - 1) * len(x)
    return {"perturb": rows, "perturb_in": guidance.pag_layers}


def plain(c: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Classifier-free guidance, and nothing else, where w is above 1."""
    return torch.where(w > 1, classifier_free(c, u, w), c)


class Combination:
    """Any guidance's formula; it remembers APG's change from one step to the next."""

    def __init__(self, guidance: Guidance):
        self.guidance = guidance
        self._change: Tensor | None = None

    def __call__(self, c: Tensor, w: Tensor, u: Tensor | None = None, p: Tensor | None = None) -> Tensor:
        """c, u, p (B, C, H, W) -> guided (B, C, H, W); u is absent where no w is above 1, p without PAG."""
        guided = c if u is None else torch.where(w > 1, self._against(c, u, w), c)
        if p is not None and self.guidance.pag_scale:
            guided = guided + self.guidance.pag_scale * (c - p)  # Ahn et al. 2024
        if not self.guidance.rescale:
            return guided
        return torch.where((w > 1) | (p is not None), rescaled(guided, c, self.guidance.rescale), c)

    def _against(self, c: Tensor, u: Tensor, w: Tensor) -> Tensor:
        g = self.guidance
        if g.kind == "cfg_zero":
            u = best_scale(c, u) * u
        momentum, eta, threshold = g.apg_momentum, g.apg_eta, g.apg_threshold
        if momentum is None or eta is None or threshold is None:  # all of them: the kind is not apg
            return classifier_free(c, u, w)
        self._change = c - u if self._change is None else c - u + momentum * self._change
        return projected(c, self._change, w, eta, threshold)


# An evaluation between two steps counts to the earlier one, one at the next step's sigma (Heun's second) to the next.
def step_at(sigma: float, levels: Sequence[float]) -> int:
    """The step (from 0) that an evaluation at `sigma` belongs to; `levels` are where the steps begin, descending."""
    above = sum(level > sigma for level in levels)
    exact = above < len(levels) and levels[above] == sigma
    return max(0, above - (not exact))


def zero_init(guidance: Guidance, schedule: Schedule) -> int:
    """How many first steps leave x as it is: of CFG-Zero*, for flow models. Raises ConfigError for others."""
    steps = guidance.zero_init_steps
    if steps and not schedule.is_flow:
        what = f"skips steps of flow models, and this model's prediction_type is {schedule.prediction_type}"
        raise ConfigError(what, where="zero_init_steps", hint="leave it out; the rest of cfg_zero works")
    return int(guidance.kind == "cfg_zero" and schedule.is_flow) if steps is None else steps


def _weights(scale: float | tuple[float, ...], cond: Any, uncond: Any | None) -> Tensor:
    """(1,) or (B,) fp32 on the CPU, checked together with the conditions."""
    weights = torch.tensor(scale, dtype=torch.float32)
    if weights.numel() not in (1, len(cond)):
        raise ConfigError(f"guidance_scale has shape {tuple(weights.shape)} for {len(cond)} images")
    if (weights > 1).any() and (uncond is None or len(uncond) != len(cond)):
        count = "no" if uncond is None else len(uncond)
        raise ConfigError(f"guidance needs one unconditional row an image: {count} for {len(cond)}")
    return weights.reshape(-1)


# The arithmetic of each guidance on raw answers of the network (B, C, H, W) fp32; weights w are (B, 1, 1, 1).
# c with the prompt   u without it   p with the prompt and perturbed attention
# Sums over an image are taken image by image: in one call, their order would depend on the batch.


def classifier_free(c: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Ho & Salimans 2022, eq. 6, whose w is ours less 1."""
    return u + w * (c - u)


def best_scale(c: Tensor, u: Tensor) -> Tensor:
    """(B, 1, 1, 1): the multiple of u that is nearest to c (Fan et al. 2025, section 4)."""
    return of_each_image(lambda c, u: (c * u).sum() / (u.square().sum() + 1e-8), c, u)


def projected(c: Tensor, change: Tensor, w: Tensor, eta: float, threshold: float) -> Tensor:
    """APG (Sadat et al. 2024) for `change` = c - u with its momentum: c + (w - 1) * what is left of it.

    The change is shortened to a norm of `threshold`, and its part along c is multiplied by eta.
    """
    if threshold > 0:
        norm = of_each_image(torch.linalg.vector_norm, change)
        change = change * (threshold / norm).clamp(max=1)
    exact = torch.float64 if c.device.type != "mps" else torch.float32
    change, along = change.to(exact), c.to(exact)
    unit = along / of_each_image(torch.linalg.vector_norm, along).clamp(min=1e-12)
    parallel = of_each_image(lambda a, b: (a * b).sum(), change, unit) * unit
    return c + (w - 1) * (change - parallel + eta * parallel).float()


def rescaled(guided: Tensor, c: Tensor, share: float) -> Tensor:
    """`guided` with a share of c's standard deviation restored (Lin et al. 2024, section 3.4)."""
    ratio = of_each_image(torch.std, c) / of_each_image(torch.std, guided)
    return share * (guided * ratio) + (1 - share) * guided


def of_each_image(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A number of each image, (B, 1, 1, 1)."""
    numbers = torch.stack([function(*image) for image in zip(*tensors)])
    return numbers.view(-1, *[1] * (tensors[0].ndim - 1))
