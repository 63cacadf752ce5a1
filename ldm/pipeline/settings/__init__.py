"""The settings of Pipeline and generate: their words, their checks, and one call's choice of them."""

from ldm.pipeline.keywords import (
    ALIASES,
    BATCH,
    EDITING_WORDS,
    GUIDANCE,
    GUIDANCE_OPTIONS,
    GUIDANCE_WORDS,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_STEPS,
    SAMPLER,
    STEPS,
    UNSUPPORTED,
    canonical,
)
from ldm.pipeline.settings.call import Request, Settings, check_call, check_schedule, own_scale
from ldm.pipeline.settings.checks import (
    check_guidance,
    check_int,
    check_negative,
    check_prompts,
    check_size,
)

__all__ = [
    "ALIASES",
    "BATCH",
    "EDITING_WORDS",
    "GUIDANCE",
    "GUIDANCE_OPTIONS",
    "GUIDANCE_WORDS",
    "MAX_IMAGES",
    "MAX_PROMPT",
    "MAX_STEPS",
    "SAMPLER",
    "STEPS",
    "UNSUPPORTED",
    "Request",
    "Settings",
    "canonical",
    "check_call",
    "check_guidance",
    "check_int",
    "check_negative",
    "check_prompts",
    "check_schedule",
    "check_size",
    "own_scale",
]
