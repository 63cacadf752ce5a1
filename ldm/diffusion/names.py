"""Samplers and spacings by the names that people know them by, and which goes with which. No torch here.

Names are compared without case, spaces, underscores and hyphens, "++" as "pp", and without the beginnings `k_` and
`sample_` and the ending `_gpu`: "DPM++ 2M", "dpmpp_2m" and "sample_dpmpp_2m" need one entry between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacings import SPACINGS
from ldm.errors import ConfigError, nearest

# A1111's label first (where it has one), then diffusers' classes and what k-diffusion, ComfyUI and kohya say.
SAMPLER_NAMES: dict[str, tuple[str, ...]] = {
    "euler": ("Euler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler_ancestral": ("Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": ("Heun", "HeunDiscreteScheduler"),
    "heun_flow": ("Heun flow", "FlowMatchHeunDiscreteScheduler"),
    "dpm2": ("DPM2", "KDPM2DiscreteScheduler", "dpm_2"),
    "dpmpp_2s_ancestral": ("DPM++ 2S a",),
    "dpmpp_2m": ("DPM++ 2M", "DPMSolverMultistepScheduler", "dpmsolver", "dpmsolver++"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE",),
    "dpmpp_sde": ("DPM++ SDE", "DPMSolverSDEScheduler"),
    "dpmpp_3m_sde": ("DPM++ 3M SDE",),
    "unipc": ("UniPC", "UniPCMultistepScheduler", "uni_pc", "uni_pc_bh2"),
    "lms": ("LMS", "LMSDiscreteScheduler"),
    "ddpm": ("DDPM", "DDPMScheduler"),
    "ddim": ("DDIM", "DDIMScheduler"),
    "lcm": ("LCM", "LCMScheduler", "FlowMatchLCMScheduler"),
    "tcd": ("TCD", "TCDScheduler"),
}
# A1111's schedule type first (where it has one), then what ComfyUI and diffusers say.
SPACING_NAMES: dict[str, tuple[str, ...]] = {
    "leading": ("Leading",),
    "linspace": ("Uniform", "normal"),
    "trailing": ("Trailing",),
    "karras": ("Karras", "use_karras_sigmas", "ka"),
    "exponential": ("Exponential", "use_exponential_sigmas"),
    "beta": ("Beta", "use_beta_sigmas"),
    "sgm_uniform": ("SGM Uniform",),
    "simple": ("Simple",),
    "ays": ("Align Your Steps", "AYS"),
    "ays_xl": ("Align Your Steps XL", "AYS XL"),
}
ETA = {  # what samplers with an `eta` take where none is given
    "ddim": 0.0,
    "tcd": 0.3,  # its gamma
    "euler_ancestral": 1.0,
    "dpmpp_2s_ancestral": 1.0,
    "dpmpp_sde": 1.0,
    "dpmpp_2m_sde": 1.0,
    "dpmpp_3m_sde": 1.0,
}
# Which sampler goes with which prediction type: all but heun_flow with epsilon, v_prediction and sample, these with
# flow. heun, dpm2 and lms multiply by sigma / sigma_next, which has no bound where flow begins; for the others that add
# noise, programs differ in how they do it with flow, and there is no peer to compare with.
FLOW_SAMPLERS = ("euler", "heun_flow", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim", "lcm")
# Which spacing goes with which: every one with all samplers of a schedule of betas (lcm and tcd have their own where
# none is chosen), none with flow, and the ays only with a schedule that begins where Stable Diffusion's does
# (`Schedule` refuses the others).


def _key(name: str) -> str:
    bare = re.sub(r"^(sample_|k_)|_gpu$", "", name.strip().lower())
    return re.sub(r"[\s_-]", "", bare).replace("++", "pp")


def _table(names: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {_key(other): name for name, others in names.items() for other in (name, *others)}


_SAMPLERS, _SPACINGS = _table(SAMPLER_NAMES), _table(SPACING_NAMES)


def resolve(name: object) -> tuple[str, str | None]:
    """(sampler, spacing or None) of a sampler's name or label, joined labels such as "DPM++ 2M Karras" included.

    Raises ConfigError for another name, with the nearest.
    """
    key = _key(name) if isinstance(name, str) else None
    if key in _SAMPLERS:
        return _SAMPLERS[key], None
    for end, spacing in _SPACINGS.items():
        if key and key.endswith(end) and key[: -len(end)] in _SAMPLERS:
            return _SAMPLERS[key[: -len(end)]], spacing
    raise _unknown_sampler(name)


def _unknown_sampler(name: object) -> ConfigError:
    known = [*SAMPLER_NAMES, *(other for others in SAMPLER_NAMES.values() for other in others)]
    hint = nearest(str(name)[:80], known)
    if not hint.startswith("did you mean"):
        hint = f"choose from: {', '.join(SAMPLER_NAMES)}"
    return ConfigError(f"unknown sampler {name!r:.80}", where="sampler", hint=hint)


def resolve_spacing(name: object) -> str | None:
    """The spacing of a name or label; None for "Automatic". Raises ConfigError for another name, with the nearest."""
    key = _key(name) if isinstance(name, str) else None
    if key == "automatic":
        return None
    if key not in _SPACINGS:
        raise ConfigError(f"unknown spacing {name!r:.80}", where="spacing", hint=nearest(str(name)[:80], SPACINGS))
    return _SPACINGS[key]


def check(sampler: str, prediction_type: str, spacing: str | None = None) -> None:
    """Raise ConfigError where a sampler does not work with a prediction type, or a spacing with either."""
    flow = prediction_type == "flow"
    if (flow and sampler not in FLOW_SAMPLERS) or (sampler == "heun_flow" and not flow):
        raise _no_match(sampler, prediction_type)
    if flow and spacing is not None:
        raise ConfigError(f"{spacing} does not apply: a flow model has its own", where="spacing", hint="leave it out")


def _no_match(sampler: str, prediction_type: str) -> ConfigError:
    if prediction_type == "flow":
        hint = f"choose from: {', '.join(FLOW_SAMPLERS)}"
        return ConfigError(f"{sampler} does not work with flow models", where="sampler", hint=hint)
    what = f"heun_flow is for flow models; this one predicts {prediction_type}"
    return ConfigError(what, where="sampler", hint="use heun")


def options(sampler: str, eta: float | None) -> dict[str, float]:
    """The keywords a sampler is called with: {} or {"eta": eta}.

    Raises ConfigError for a number outside 0 to 1, and for one above 0 with a sampler that has no eta; ddpm always
    adds its noise, so that it refuses 0 as well.
    """
    if eta is None:
        return {}
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not math.isfinite(eta) or not 0 <= eta <= 1:
        raise ConfigError(f"expected a number from 0 to 1, got {eta!r:.80}", where="eta")
    if sampler in ETA:
        return {"eta": float(eta)}
    if eta > 0 or sampler == "ddpm":
        hint = f"leave it out, or choose from: {', '.join(ETA)}"
        raise ConfigError(f"the sampler {sampler} takes no eta", where="eta", hint=hint)
    return {}


def _first_line(function: Callable) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def help_text() -> str:
    """What `ldm generate --help-samplers` prints: every sampler and spacing with its other names."""
    lines = ["Samplers (* also with flow models, ** with these only):", ""]
    for name, others in SAMPLER_NAMES.items():
        mark = "**" if name == "heun_flow" else "*" if name in FLOW_SAMPLERS else ""
        lines += [f"  {name + mark:21}{', '.join(others)}", f"{'':23}{_first_line(SAMPLERS[name])}"]
    lines += ["", "Spacings, alone or behind a sampler's name (DPM++ 2M Karras); not with flow models:", ""]
    for name, others in SPACING_NAMES.items():
        lines += [f"  {name:21}{', '.join(others)}", f"{'':23}{_first_line(SPACINGS[name])}"]
    takes = ", ".join(f"{name} ({eta:g})" for name, eta in ETA.items())
    lines += ["", "Upper and lower case, spaces, - and _ do not matter.", f"eta (its default): {takes}"]
    return "\n".join(lines)
