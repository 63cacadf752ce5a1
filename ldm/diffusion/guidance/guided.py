"""Networks under guidance: conditions bound to predict(x, timesteps, condition), the answers combined.

Conditions are any objects with len(c) == B and a classmethod cat([...]), such as ldm.nn.text.Conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ldm.diffusion.guidance.formulas import best_scale, classifier_free, projected, rescaled
from ldm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.guidance.settings import Guidance
    from ldm.diffusion.schedule import Schedule

    Predict = Callable[..., Tensor]
    Guided = Callable[[Tensor, Tensor], Tensor]

EXACT = 1e-3  # of a timestep: two that are nearer are the same


def cfg(predict: Predict, cond: Any, uncond: Any | None, scale: float | Tensor) -> Guided:
    """Bind conditions: (x (B, C, H, W), timesteps (B,)) -> raw (B, C, H, W) fp32, u + scale (c - u) at every step.

    predict(x, timesteps, condition) -> raw. Both halves go through the network in one batch of 2 B, the unconditional
    one first. scale is one number or (B,), one a picture; 1 and less mean no guidance, as in diffusers: rows of such
    a scale are the conditional half alone, and where all are, no unconditional half is computed (uncond may be None).
    Raises ConfigError for a scale that is not finite or not one number or one a picture.
    """
    import torch

    weights = _weights(scale, cond, uncond)
    if (weights <= 1).all():
        return lambda x, timesteps: predict(x, timesteps, cond).float()
    both = type(cond).cat([uncond, cond])

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        raw = predict(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both)
        u, c = raw.float().chunk(2)
        w = weights.to(x.device).view(-1, *[1] * (x.ndim - 1))
        return torch.where(w > 1, classifier_free(c, u, w), c)

    return guided


def guide(
    predict: Predict,
    cond: Any | Callable[[int], Any],
    uncond: Any | Callable[[int], Any] | None,
    guidance: Guidance,
    schedule: Schedule,
    sigmas: Tensor,
) -> Guided:
    """Bind conditions to one sampling run over `sigmas` (n + 1,): (x (B, C, H, W), timesteps (B,)) -> raw, as `cfg`.

    A condition may be a function of the step (from 0) that gives that step's. All rows of a call are at one timestep;
    an evaluation between two steps counts to the earlier, one at the next step's sigma (Heun's second) to the next.
    Rows through the network: B for the prompt, B more where a scale is above 1, B more for PAG (then with the keyword
    perturb=mask (B',) bool, True where self-attention is to be replaced by the identity, and perturb_in=layers), in the
    order u, c, p; outside of the interval B, in steps of zero-init none.

    Made for one run: APG's momentum begins with it. Raises ConfigError as `cfg`, and for zero-init without flow, whose
    answer 0 means that x stays; elsewhere it would mean a picture.
    """
    import torch

    at, other = (c if callable(c) else (lambda step, c=c: c) for c in (cond, uncond))
    weights = _weights(guidance.scale, at(0), other(0))
    clock = Clock(schedule, sigmas)
    skipped = zero_init(guidance, schedule)
    parts = [part for part, used in (("u", (weights > 1).any()), ("c", True), ("p", guidance.pag_scale)) if used]
    combine = Combination(guidance)
    joined: dict[str, Any] = {}

    def conditions(step: int) -> Any:
        now = {"u": other(step), "c": at(step), "p": at(step)}
        if any(joined.get(part) is not now[part] for part in parts):
            joined.update(now, all=type(now["c"]).cat([now[part] for part in parts]))
        return joined["all"]

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        time = float(timesteps[0])
        step = clock.step(time)
        if len(parts) == 1 or not clock.inside(guidance, time):
            return predict(x, timesteps, at(step)).float()
        if step < skipped:
            return torch.zeros_like(x, dtype=torch.float32)
        perturbed = {}
        if "p" in parts:
            rows = torch.arange(len(parts) * len(x), device=x.device) >= (len(parts) - 1) * len(x)
            perturbed = {"perturb": rows, "perturb_in": guidance.pag_layers}
        repeated = torch.cat([x] * len(parts)), torch.cat([timesteps] * len(parts))
        raw = predict(*repeated, conditions(step), **perturbed).float()
        w = weights.to(x.device).expand(len(x)).view(-1, *[1] * (x.ndim - 1))
        return combine(w=w, **dict(zip(parts, raw.chunk(len(parts)))))

    return guided


class Combination:
    """A guidance's formula; it remembers APG's change from one step to the next."""

    def __init__(self, guidance: Guidance):
        self.guidance = guidance
        self._change: Tensor | None = None

    def __call__(self, c: Tensor, w: Tensor, u: Tensor | None = None, p: Tensor | None = None) -> Tensor:
        """c, u, p (B, C, H, W) -> guided (B, C, H, W); u is absent where no w is above 1, p but for PAG."""
        import torch

        found = c if u is None else torch.where(w > 1, self._against(c, u, w), c)
        if p is not None:
            found = found + self.guidance.pag_scale * (c - p)  # Ahn et al. 2024
        if not self.guidance.rescale:
            return found
        return torch.where((w > 1) | (p is not None), rescaled(found, c, self.guidance.rescale), c)

    def _against(self, c: Tensor, u: Tensor, w: Tensor) -> Tensor:
        g = self.guidance
        if g.kind == "cfg_zero":
            u = best_scale(c, u) * u
        if g.kind != "apg":
            return classifier_free(c, u, w)
        self._change = c - u if self._change is None else c - u + g.apg_momentum * self._change
        return projected(c, self._change, w, g.apg_eta, g.apg_threshold)


class Clock:
    """Which step of a run, and which sigma, a timestep of the network's belongs to."""

    def __init__(self, schedule: Schedule, sigmas: Tensor):
        self.schedule = schedule
        self.sigmas: list[float] = sigmas[:-1].tolist()
        self.times: list[float] = schedule.timestep(sigmas[:-1]).tolist()  # descending

    def step(self, time: float) -> int:
        """The step from 0; of several at the same timestep, as a flow model may have, the first."""
        later = sum(t > time + EXACT for t in self.times)
        exact = later < len(self.times) and self.times[later] > time - EXACT
        return max(0, later - (not exact))

    def sigma(self, time: float) -> float:
        step = self.step(time)
        exact = abs(self.times[step] - time) < EXACT
        return self.sigmas[step] if exact else float(self.schedule.sigma(time))

    def inside(self, guidance: Guidance, time: float) -> bool:
        """Whether the guidance's interval holds this moment."""
        if guidance.interval is not None:
            first, end = (int(fraction * len(self.times)) for fraction in guidance.interval)  # as diffusers rounds
            return first <= self.step(time) < end
        if guidance.sigma_interval is not None:
            low, high = guidance.sigma_interval
            return low < self.sigma(time) <= high
        return True


def zero_init(guidance: Guidance, schedule: Schedule) -> int:
    """How many first steps leave x as it is: of CFG-Zero*, for flow models. Raises ConfigError for others."""
    asked = guidance.zero_init_steps
    if asked and not schedule.is_flow:
        raise ConfigError(
            f"skips steps of flow models, and this model's prediction_type is {schedule.prediction_type}",
            where="zero_init_steps",
            todo="leave it out; the rest of cfg_zero works",
        )
    return int(guidance.kind == "cfg_zero" and schedule.is_flow) if asked is None else asked


def _weights(scale: float | tuple[float, ...] | Tensor, cond: Any, uncond: Any | None) -> Tensor:
    """(1,) or (B,) fp32 on the CPU, checked together with the conditions."""
    import torch

    weights = torch.as_tensor(scale, dtype=torch.float32).cpu()
    if not weights.isfinite().all():
        raise ConfigError("guidance_scale must be a finite number", todo="NaN or infinity was given")
    if weights.ndim > 1 or weights.numel() not in (1, len(cond)):
        raise ConfigError(f"guidance_scale has shape {tuple(weights.shape)} for {len(cond)} pictures")
    if (weights > 1).any() and (uncond is None or len(uncond) != len(cond)):
        count = "no" if uncond is None else len(uncond)
        raise ConfigError(f"guidance needs one unconditional row a picture: {count} for {len(cond)}")
    return weights.reshape(-1)
