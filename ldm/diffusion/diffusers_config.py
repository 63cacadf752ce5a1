"""Schedules as diffusers writes them: scheduler_config.json, read and written, without importing diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.diffusion.schedule import Schedule, SizeShift
from ldm.errors import ConfigError, ModelError, nearest

WHERE = "scheduler_config.json"

# Every one of these names a way of stepping over the same schedule; which sampler runs is our own choice.
CLASSES = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("LCMScheduler", "TCDScheduler", "SASolverScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler"),
    *("DDPMParallelScheduler", "DPMSolverMultistepInverseScheduler"),
)
FLOW_MATCH = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")  # of SD3 and FLUX
NEW_WAYS = ("LCMScheduler", "TCDScheduler", "SASolverScheduler")  # distilled or other: never taken for our default
LINSPACE_BY_DEFAULT = ("Euler", "Heun", "LMS", "KDPM2", "DPMSolver", "DEIS", "UniPC")  # the others: leading

# Settings that reach further than stepping, with the values that change nothing for us.
ONLY: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "use_dynamic_shifting": (False,),
    "timestep_type": ("discrete",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# Settings of diffusers' stepping that ours replaces, with the values that ask for nothing of their own.
STEPPING: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (float("-inf"), "-Infinity", "-inf"),
    "algorithm_type": ("dpmsolver++",),
}
SPACED_BY = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
ALGORITHMS = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}
SAMPLERS = {  # classes whose stepping is one of our samplers; of all others ours takes the place
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
# Settings of one stepping method, or of a method that is refused above: without effect on the schedule.
IGNORED = (
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps", "solver_order"),
    *("solver_type", "lower_order_final", "euler_at_final", "time_shift_type", "predict_x0", "disable_corrector"),
    *("solver_p", "noise_sampler_seed", "sigma_type", "shift_terminal", "original_inference_steps"),
    *("timestep_scaling", "predictor_order", "corrector_order", "predictor_corrector", "tau_func", "gamma"),
)
OURS = (
    *("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr"),
    *("timestep_spacing", "steps_offset", "flow_shift", "set_alpha_to_one", "use_flow_sigmas"),
)
NAMES = {  # diffusers' -> ours
    "num_train_timesteps": "num_train_timesteps",
    "beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "timestep_spacing": "spacing",
    "steps_offset": "steps_offset",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
}
SIZE_SHIFT = {  # FlowMatchEulerDiscreteScheduler's -> SizeShift's
    "base_image_seq_len": "tokens",
    "base_shift": "shift",
    "max_image_seq_len": "most_tokens",
    "max_shift": "most_shift",
}
FLOW_MATCH_KEYS = ("num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type", *SIZE_SHIFT)
FLOW = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 1.0,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}


def _refuse(key: str, value: Any, hint: str | None = None) -> ModelError:
    return ModelError(f"{key} {value!r} is not supported", where=WHERE, hint=hint)


def _check(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "DDIMScheduler")
    if name not in CLASSES:
        raise _refuse("_class_name", name, nearest(str(name), CLASSES))
    for key, value in config.items():
        if key in ONLY:
            if value not in ONLY[key]:
                raise _refuse(key, value)
        elif not (
            key.startswith("_") or key in IGNORED or key in STEPPING or key in OURS or value is None or value is False
        ):
            raise _refuse(key, value)


def read_stepping(config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """({"sampler": …, "spacing": …} that step as a config asks, one line about what ours replaces or None).

    {} for a config that asks for nothing of its own: which sampler runs is our choice then.
    """
    name = config.get("_class_name", "DDIMScheduler")
    if name in FLOW_MATCH:
        return {"sampler": "euler" if name == FLOW_MATCH[0] else "heun_flow"}, None
    special = {key: config[key] for key in STEPPING if key in config and config[key] not in STEPPING[key]}
    return _stepping(config, name, special) if special or name in NEW_WAYS else ({}, None)


def _stepping(config: Mapping[str, Any], name: str, special: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """As read_stepping, of a config that steps in its own way; `special` are the settings that say so."""
    found = {"sampler": SAMPLERS.get(name, "")}
    if name == "DPMSolverMultistepScheduler":
        found["sampler"] = ALGORITHMS.get(special.pop("algorithm_type", "dpmsolver++"), "")
    spacing = next((ours for key, ours in SPACED_BY.items() if special.pop(key, False)), "")
    if not config.get("use_flow_sigmas"):
        found["spacing"] = spacing
    found = {key: value for key, value in found.items() if value}
    lost = [] if "sampler" in found else [name.removesuffix("Scheduler")]
    lost += [f"{key} {value!r:.40}" for key, value in special.items()]
    ours = ", ".join(found.values()) or "our own sampler"
    return found, f"{WHERE}: {', '.join(lost)} replaced by {ours}" if lost else None


def read_scheduler(config: Mapping[str, Any]) -> Schedule:
    """Schedule of a scheduler_config.json (as a dict), with diffusers' own defaults for what it leaves out.

    ModelError names a class or a setting that is not supported, or a combination that is not possible.
    """
    if config.get("_class_name") in FLOW_MATCH:
        return _flow_match(config)
    _check(config)
    name = config.get("_class_name", "DDIMScheduler")
    prediction, flow = config.get("prediction_type", "epsilon"), config.get("use_flow_sigmas", False)
    if (prediction == "flow_prediction") != bool(flow):
        raise _refuse("use_flow_sigmas", flow, f"prediction_type is '{prediction}', and the two go together")
    found: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 0}
    found["spacing"] = "linspace" if name.startswith(LINSPACE_BY_DEFAULT) else "leading"
    found |= {ours: config[key] for key, ours in NAMES.items() if key in config}
    found["prediction_type"] = "flow" if flow else prediction
    found["set_alpha_to_one"] = config.get("set_alpha_to_one", name != "PNDMScheduler")
    if flow:  # its sigmas replace those of the betas, which are there; the last sigma is 0 in any case
        found |= {"rescale_betas_zero_snr": False, "set_alpha_to_one": False}
        found["flow_shift"] = config.get("flow_shift", 1.0)
    try:
        return Schedule(**found)
    except (ConfigError, TypeError) as error:
        raise ModelError(str(error), where=WHERE) from error


def _flow_match(config: Mapping[str, Any]) -> Schedule:
    """Schedule of SD3's and FLUX's schedulers; steps are spaced as SD3's pipeline does until the model is known."""
    for key, value in config.items():
        if not (key.startswith("_") or key in FLOW_MATCH_KEYS or value is None or value is False):
            raise _refuse(key, value)
    by_size = None
    try:
        if config.get("use_dynamic_shifting"):
            given = {ours: config[key] for key, ours in SIZE_SHIFT.items() if config.get(key) is not None}
            by_size = SizeShift(**given, linear=config.get("time_shift_type") == "linear")
        return Schedule(
            prediction_type="flow",
            spacing="linspace",
            whole_timesteps=False,
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            flow_shift=1.0 if by_size else config.get("shift", 1.0),
            size_shift=by_size,
        )
    except (ConfigError, TypeError) as error:
        raise ModelError(str(error), where=WHERE) from error


def _write_flow_match(schedule: Schedule) -> dict[str, Any]:
    by_size = schedule.size_shift or SizeShift()
    return {
        "_class_name": FLOW_MATCH[0],
        "num_train_timesteps": schedule.num_train_timesteps,
        "shift": schedule.flow_shift,
        "use_dynamic_shifting": schedule.size_shift is not None,
        "time_shift_type": "linear" if by_size.linear else "exponential",
        **{key: getattr(by_size, ours) for key, ours in SIZE_SHIFT.items()},
    }


def write_scheduler(schedule: Schedule) -> dict[str, Any]:
    """scheduler_config.json of a schedule: DDIMScheduler, for flow DPMSolverMultistepScheduler, or SD3's and FLUX's
    FlowMatchEulerDiscreteScheduler.

    diffusers' StableDiffusionPipeline renders these two as they are; it expects steps_offset 1 and warns otherwise.
    """
    common = {name: getattr(schedule, ours) for name, ours in NAMES.items()}
    if not schedule.whole_timesteps:
        return _write_flow_match(schedule)
    if schedule.is_flow:
        return {"_class_name": "DPMSolverMultistepScheduler", **common, **FLOW, "flow_shift": schedule.flow_shift}
    common |= {"prediction_type": schedule.prediction_type, "clip_sample": False}
    end = {"set_alpha_to_one": schedule.set_alpha_to_one, "thresholding": False}
    return {"_class_name": "DDIMScheduler", **common, **end}
