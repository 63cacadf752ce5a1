"""Options that several commands share: how images are drawn, and with which model. Each under its Python name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from ldm.diffusion.guidance.settings import GUIDANCES, SIGMA_INTERVALS, STEP_INTERVALS
from ldm.errors import ConfigError
from ldm.pipeline.keywords import ALIASES, GUIDANCE, SAMPLER, STEPS, adapter_scales, control_modes


class HelpSamplers(argparse.Action):
    """Prints the table and ends, like --help."""

    def __call__(self, parser, *_):
        from ldm.diffusion.names import help_text

        print(help_text())
        parser.exit()


class Option(NamedTuple):
    """A keyword of generate or of Pipeline as an option; ALIASES has its other words, which are options too."""

    name: str
    metavar: Any
    help: str
    more: Any = None  # other keywords of add_argument


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r:.80}") from None


class Preset(argparse.Action):
    """A name for an interval of steps or of sigmas in which guidance is on."""

    def __call__(self, parser, namespace, name, option=None):
        for dest, presets in (("guidance_interval", STEP_INTERVALS), ("guidance_sigma_interval", SIGMA_INTERVALS)):
            if name in presets:
                return setattr(namespace, dest, presets[name])
        parser.error(f"argument {option}: expected {', '.join((*STEP_INTERVALS, *SIGMA_INTERVALS))}, got {name!r:.80}")


def _sides(text: str) -> dict[str, int]:
    """left=64,top=32 as a mapping."""
    try:
        pairs = [(part.split("=")[0].strip(), int(part.split("=")[1])) for part in text.split(",")]
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"expected sides such as left=64,top=32, got {text!r:.80}") from None
    return dict(pairs)


def _tiling(text: str) -> bool | str:
    words = {"yes": True, "no": False, "auto": "auto"}
    if text not in words:
        raise argparse.ArgumentTypeError(f"expected yes, no or auto, got {text!r:.80}")
    return words[text]


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a colon in the name is no weight unless a number follows."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def names_of(name: str) -> list[str]:
    """--name, then every word that ALIASES takes for it (those of one letter are left to prompt files)."""
    words = [name, *(word for word, own in ALIASES.items() if own == name and len(word) > 1 and word != "generator")]
    return [f"--{word.replace('_', '-')}" for word in sorted(words, key="steps".__ne__)]  # --steps comes first


def _guidance_options() -> list[Option]:
    """One for each option of each kind of guidance."""
    found, types = [], {"pag_layers": _names, "zero_init_steps": int}
    for kind, entry in GUIDANCES.items():
        for name, own in entry.options.items():
            shown = ",".join(own) if isinstance(own, tuple) else "1 for flow models" if own is None else f"{own:g}"
            found.append(Option(name, "X", f"of {kind} ({shown})", {"type": types.get(name, float)}))
    return found


INT, FLOAT, INTERVAL, ENDS = {"type": int}, {"type": float}, {"type": float, "nargs": 2}, ("FROM", "TO")
PRESETS = ", ".join(f"{name} ({low:g} {high:g})" for name, (low, high) in STEP_INTERVALS.items())
PRESETS += ", ".join(f", {name} (sigmas {low:g} {high:g})" for name, (low, high) in SIGMA_INTERVALS.items())
SWITCH, AUTO, SEVERAL = {"action": "store_true"}, {"default": "auto"}, {"action": "append"}
BLOCKS = {"action": "store_const", "const": "blocks", "dest": "offload"}
SHIPPED = {"default": "default"}
# How an image is drawn
DRAWING = [
    Option("num_inference_steps", "N", f"(the model's, or {STEPS})", INT),
    Option("width", "PIXELS", "(the model's)", INT),
    Option("height", "PIXELS", "(the model's)", INT),
    Option("negative_prompt", "TEXT", "what to keep away from", {"default": ""}),
    Option("guidance_scale", "X", f"1: without guidance (the model's, or {GUIDANCE:g})", FLOAT),
    Option("guidance", "NAME", "cfg, apg, pag or cfg_zero (cfg)", {"default": "cfg"}),
    Option("guidance_rescale", "X", "0 to 1: against too much contrast at high scales (0)", FLOAT),
    Option("guidance_interval", ENDS, "guide only in this part of the steps, 0 to 1", INTERVAL),
    Option("guidance_sigma_interval", ENDS, "or only between these sigmas", INTERVAL),
    Option("guidance_preset", "NAME", f"or by a name: {PRESETS}", {"action": Preset}),
    *_guidance_options(),
    Option("sampler", "NAME", f"see --help-samplers (the model's, or {SAMPLER})"),
    Option("spacing", "NAME", "trailing, karras, …: see --help-samplers (the model's)"),
    Option("timesteps", "N,N,…", "the timesteps themselves, descending, instead of a spacing", {"type": _numbers}),
    Option("sigmas", "X,X,…", "or the sigmas", {"type": _numbers}),
    Option("true_cfg_scale", "X", "of FLUX: guidance with the negative prompt (1: none)", FLOAT),
    Option("eta", "X", "0 to 1: the noise of samplers that add as much as they are told to", FLOAT),
    Option("clip_skip", "N", "layers of CLIP to leave out; 1 is A1111's 'Clip skip: 2' (0)", INT),
    Option("emphasis", "NAME", "how (word:1.3) acts: original or no_norm (original)", {"default": "original"}),
    Option("step_cache", "N", "reuse a U-Net's deep features, new in every N-th step: faster, inexact (1: off)", INT),
    Option(
        "help_samplers", None, "list samplers and spacings with all their names", {"action": HelpSamplers, "nargs": 0}
    ),
]
# What it is drawn from, and around it
EDITING = [
    Option("image", "IMAGE", "begin at this image; its size is drawn"),
    Option("mask_image", "IMAGE", "of its size: white is painted, where it is black nothing changes"),
    Option("strength", "X", "0 to 1: how much of the steps is run (0.8; outpaint: 1)", FLOAT),
    Option("outpaint", "SIDE=PIXELS,…", "make it larger: left=64,right=…,top=…,bottom=…", {"type": _sides}),
    Option("variation_seed", "N", "mix in this seed's noise; image k of -n has N + k", INT),
    Option("variation_strength", "X", "0 to 1: how much of it", FLOAT),
    Option("hires_scale", "X", "draw, make X times larger, and draw on", FLOAT),
    Option("hires_steps", "N", "of the second time (as many as of the first)", INT),
    Option("hires_strength", "X", "0 to 1: how much of these is run (the model's, or 0.7)", FLOAT),
    Option(
        "vae_tiling", "WHEN", "whether the VAE works in tiles: yes, no, auto (auto: above 1024x1024)", {"type": _tiling}
    ),
]
# What steers it
CONTROL = [
    Option("control", "KIND:IMAGE[:X]", "edges:photo.png:0.8: a condition that is made here", {"action": "append"}),
    Option("controlnet", "PATH", "of a ControlNet or T2I-Adapter; may be given several times", {"action": "append"}),
    Option("control_image", "IMAGE", "what it looks at, one for each; or KIND:IMAGE", {"action": "append"}),
    Option("controlnet_conditioning_scale", "X,X,…", "how much it does, 0 and up (1)", {"type": _numbers}),
    Option("control_guidance_start", "X,X,…", "from which part of the steps on, 0 to 1 (0)", {"type": _numbers}),
    Option("control_guidance_end", "X,X,…", "to which part of the steps (1)", {"type": _numbers}),
    Option("control_mode", "N,N+N,…", "what a ControlNet Union looks at; - for others", {"type": control_modes}),
    Option(
        "guess_mode",
        None,
        "act on the answer with the prompt alone, and less at high resolutions",
        {"action": "store_true", "default": None},
    ),
    Option("ip_adapter", "FILE", "an IP-Adapter, which shows images; may be given several times", {"action": "append"}),
    Option("image_encoder", "FOLDER", "the CLIP vision tower that it looks through (image_encoder/ beside it)"),
    Option("ip_adapter_image", "IMAGE", "what it shows; may be given several times", {"action": "append"}),
    Option("ip_adapter_scale", "X,X,…", "how much, one for each (1); or JSON of levels", {"type": adapter_scales}),
    Option("ip_adapter_mask", "IMAGE", "where it acts: white; one for each image", {"action": "append"}),
]
# What it is drawn with
MODEL = [
    Option("model", "MODEL", "a diffusers folder, a .safetensors file or a hub id (the shipped model)", SHIPPED),
    Option("vae", "PATH", "another VAE's folder or file"),
    Option("text_encoders", "PATH", "what a file of SD3 or FLUX lacks of CLIP and T5; several times", SEVERAL),
    Option("prediction_type", "NAME", "epsilon, v_prediction, sample (what the model says)"),
    Option("lora", "FILE[:WEIGHT]", "a LoRA or DoRA; may be given several times", {"type": _lora, "action": "append"}),
    Option("fast", None, "in few steps, with the shipped model's few-step LoRA; what is given still wins", SWITCH),
    Option("lora_dir", "FOLDER", "where <lora:name:0.8> in the prompt finds name.safetensors"),
    Option("allow_unapplied", None, "warn of a LoRA's keys that fit nowhere, instead of refusing it", SWITCH),
    Option("dora_scaling", "NAME", "how weights act on a DoRA: linear (A1111, ComfyUI) or peft, in its norm (linear)"),
    Option("device", "NAME", "auto, cpu, cuda, mps", AUTO),
    Option("dtype", "NAME", "auto, fp32, bf16, fp16", AUTO),
    Option("offload", None, "keep parts in main memory, on the GPU only while they work", SWITCH),
    Option("offload_blocks", None, "the blocks of SD3 and FLUX too, one at a time", BLOCKS),
    Option("quantization", "NAME", "int8: weights of SD3 and FLUX in 8 bits, by torchao; not exact (none)"),
    Option("attention", "NAME", "of the network: auto, sdpa, chunked, xformers", AUTO),
    Option("backend", "NAME", "of the U-Net on a CPU: torch, or openvino, which needs its package; not exact (torch)"),
    Option("compile", None, "compile the U-Net, by a C++ compiler on a CPU: for many images; other last bits", SWITCH),
]
# The keywords of generate and of Pipeline that these set
NO_KEYWORDS = ("negative_prompt", "help_samplers", "guidance_preset")  # Pipeline's, or of the command line alone
SAMPLING = tuple(one.name for one in DRAWING if one.name not in NO_KEYWORDS)
OF_MODEL = tuple(one.name for one in MODEL if "dest" not in (one.more or {}))
PIPELINES = ("controlnet", "ip_adapter", "image_encoder")  # of CONTROL
OF_CONTROL = tuple(one.name for one in CONTROL if one.name not in ("control", *PIPELINES))


def with_controls(given: dict[str, Any]) -> dict[str, Any]:
    """Options as keywords: every --control becomes an image, its weight and, without --controlnet, a ControlNet."""
    controls, given = given.get("control"), {name: value for name, value in given.items() if name != "control"}
    return _from_controls(controls, given) if controls else given


def _from_controls(controls: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    for name in ("control_image", "controlnet_conditioning_scale"):
        if given.get(name) is not None:
            raise ConfigError("is said by --control already", where=f"--{name.replace('_', '-')}", hint="leave it out")
    pairs = [(one.partition(":")[0], *_lora(one.partition(":")[2])) for one in controls]
    for one, (kind, image, _) in zip(controls, pairs):
        if not kind or not image:
            raise ConfigError(f"expected KIND:IMAGE such as edges:photo.png, got {one!r:.80}", where="--control")
    if given.get("controlnet") is None:
        given["controlnet"] = [kind for kind, _, _ in pairs]
    images, scales = [f"{kind}:{image}" for kind, image, _ in pairs], tuple(weight for *_, weight in pairs)
    return {**given, "control_image": images, "controlnet_conditioning_scale": scales}


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """How an image is drawn, what from, and with which model."""
    drawing = "drawing (in brackets what is taken where nothing is said)"
    for title, options in ((drawing, DRAWING), ("editing", EDITING), ("control", CONTROL), ("model", MODEL)):
        group = parser.add_argument_group(title)
        for name, metavar, text, more in options:
            names = names_of(name) if options is not MODEL else [f"--{name.replace('_', '-')}"]
            shown = {} if metavar is None else {"metavar": metavar}
            group.add_argument(*names, help=text, **{"dest": name, **shown, **(more or {})})
