"""The kinds of guidance with their options, and one call's choice of them, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.config import require
from ldm.errors import ConfigError, nearest

MAX_SCALE = 1000.0


@dataclass(frozen=True)
class Kind:
    """An entry of GUIDANCES."""

    does: str  # one line for --help
    options: dict[str, Any]  # name -> default; no other kind has them


# The numbers of APG are those that its paper uses with Stable Diffusion XL.
GUIDANCES: dict[str, Kind] = {
    "cfg": Kind("classifier-free guidance (Ho & Salimans 2022)", {}),
    "apg": Kind(
        "adaptive projected guidance: less of what saturates colours (Sadat et al. 2024)",
        {"apg_eta": 0.0, "apg_momentum": -0.5, "apg_threshold": 15.0},
    ),
    "pag": Kind(
        "perturbed-attention guidance, beside cfg or alone (Ahn et al. 2024)",
        {"pag_scale": 3.0, "pag_layers": ("mid",)},
    ),
    "cfg_zero": Kind(
        "CFG-Zero*: the unconditional half at its best scale; flow models skip their first steps (Fan et al. 2025)",
        {"zero_init_steps": None},
    ),
}
# Names for intervals in which guidance is on: of the steps, or of sigmas.
STEP_INTERVALS = {"half": (0.0, 0.5), "most": (0.0, 0.8)}
SIGMA_INTERVALS = {"xl": (0.28, 5.42)}  # Stable Diffusion XL (Kynkäänniemi et al. 2024)
LAYER = re.compile(r"mid|(down|up)\.\d+")


@dataclass(frozen=True)
class Guidance:
    """How the prompt is followed. An option of the chosen kind that is None takes its default from GUIDANCES.

    Raises ConfigError naming the setting: an unknown kind, a value out of range, an option of another kind.
    """

    kind: str = "cfg"
    scale: float | tuple[float, ...] = 6.0  # one for all images, or one each; 1 and less: none
    rescale: float = 0.0  # 0 to 1: how much of the conditional answer's spread is restored (Lin et al. 2024, 3.4)
    interval: tuple[float, float] | None = None  # guidance from this to that fraction of the steps, as in diffusers
    sigma_interval: tuple[float, float] | None = None  # or where low < sigma <= high (Kynkäänniemi et al. 2024)
    apg_eta: float | None = None  # how much is kept of the change along the conditional answer; 1: all
    apg_momentum: float | None = None  # of earlier changes, added to each; negative: pushed away from them
    apg_threshold: float | None = None  # longest change, as a norm over the image's latents; 0: any
    pag_scale: float | None = None
    pag_layers: tuple[str, ...] | None = None  # whose self-attention is perturbed: mid, down.0, up.1, …
    zero_init_steps: int | None = None  # first steps that do nothing; None: 1 for flow models, else 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in GUIDANCES:
            hint = nearest(str(self.kind), GUIDANCES)
            raise ConfigError(f"unknown guidance {self.kind!r:.80}", where="guidance", hint=hint)
        self._set("scale", _scale(self.scale))
        self._set("rescale", _number(self.rescale, "guidance_rescale", 0, 1))
        if self.interval is not None or self.sigma_interval is not None:
            self._check_intervals()
        for kind, entry in GUIDANCES.items():
            for name, default in entry.options.items():
                value = getattr(self, name)
                require(kind == self.kind or value is None, f"belongs to guidance '{kind}', not '{self.kind}'", name)
                if kind == self.kind:
                    self._set(name, default if value is None else OPTIONS[name](value, name))

    def _check_intervals(self) -> None:
        require(self.interval is None or self.sigma_interval is None, "give steps or sigmas, not both", "interval")
        interval = _preset(self.interval, STEP_INTERVALS, "guidance_interval")
        self._set("interval", _pair(interval, "guidance_interval", 1))
        sigmas = _preset(self.sigma_interval, SIGMA_INTERVALS, "guidance_sigma_interval")
        self._set("sigma_interval", _pair(sigmas, "guidance_sigma_interval", math.inf))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def applies(self, step: int, steps: int, sigma: float) -> bool:
        """Whether the interval holds this step (from 0) of so many, or this sigma."""
        if self.sigma_interval is not None:
            return self.sigma_interval[0] < sigma <= self.sigma_interval[1]
        first, end = (int(fraction * steps) for fraction in self.interval or (0, 1))  # as diffusers rounds
        return first <= step < end


def _scale(value: Any) -> float | tuple[float, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value  # of torch and numpy
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return _number(value, "guidance_scale", 0, MAX_SCALE)
    require(len(value) > 0, "the list is empty", "guidance_scale")
    return tuple(_number(one, f"guidance_scale[{i}]", 0, MAX_SCALE) for i, one in enumerate(value))


def _number(value: Any, where: str, low: float, high: float) -> float:
    """`value` as a float from low to high; numbers of numpy and torch are taken, truth values are not."""
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"expected a number, got {value!r:.80}", where=where)
    require(low <= number <= high, f"{number:g} is outside {low:g} to {high:g}", where)
    return number


def _preset(value: Any, presets: dict[str, tuple[float, float]], where: str) -> Any:
    """The interval of a name; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value not in presets:
        hint = nearest(value, presets)
        raise ConfigError(f"expected two numbers or {', '.join(presets)}, got {value!r:.80}", where=where, hint=hint)
    return presets[value]


def _pair(value: Any, where: str, high: float) -> tuple[float, float] | None:
    if value is None:
        return None
    good = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) == 2
    require(good, f"expected two numbers, from and to, got {value!r:.80}", where)
    start, stop = (_number(v, where, 0, high) for v in value)
    require(start < stop, f"{start:g} is not below {stop:g}", where)
    return start, stop


def _layers(value: Any, where: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    good = names and all(isinstance(name, str) and LAYER.fullmatch(name) for name in names)
    require(bool(good), f"expected mid, down.0, up.1, …, one or several of them, got {value!r:.80}", where)
    return names


def _steps(value: Any, where: str) -> int:
    number = _number(value, where, 0, 1000)
    require(number == int(number), f"expected a whole number, got {value!r:.80}", where)
    return int(number)


OPTIONS = {
    "apg_eta": lambda value, where: _number(value, where, 0, 1),
    "apg_momentum": lambda value, where: _number(value, where, -0.99, 0.99),  # at 1 it would grow for ever
    "apg_threshold": lambda value, where: _number(value, where, 0, 1e6),
    "pag_scale": lambda value, where: _number(value, where, 0, MAX_SCALE),
    "pag_layers": _layers,
    "zero_init_steps": _steps,
}
