"""Options that several commands share: how images are drawn, and with which model. Each under its Python name."""

from __future__ import annotations

import argparse

from ldm.diffusion.guidance import GUIDANCES
from ldm.pipeline.keywords import ALIASES, GUIDANCE, GUIDANCE_WORDS, SAMPLER, STEPS

# keywords of generate and of Pipeline that add_sampling and add_model set
SAMPLING = ("num_inference_steps", "guidance_scale", "height", "width", "sampler", "spacing", "timesteps", "sigmas")
SAMPLING += ("eta", "clip_skip", "emphasis", *GUIDANCE_WORDS)
MODEL = ("model", "vae", "lora", "lora_dir", "allow_unapplied", "device", "dtype")
MODEL += ("offload", "attention", "prediction_type")


class HelpSamplers(argparse.Action):
    """Prints the table and ends, like --help."""

    def __call__(self, parser, *_):
        from ldm.diffusion.names import help_text

        print(help_text())
        parser.exit()


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How an image is drawn: the negative prompt, and all of SAMPLING."""
    add = parser.add_argument_group("drawing (in brackets what is taken where nothing is said)").add_argument
    steps = [word for word in names_of("num_inference_steps") if word != "--steps"]
    add("--steps", *steps, dest="num_inference_steps", type=int, metavar="N", help=f"(the model's, or {STEPS})")
    add("--width", metavar="PIXELS", type=int, help="(the model's)")
    add("--height", metavar="PIXELS", type=int, help="(the model's)")
    add(*names_of("negative_prompt"), metavar="TEXT", default="", help="what to keep away from")
    scale = f"1: without guidance (the model's, or {GUIDANCE:g})"
    add(*names_of("guidance_scale"), type=float, metavar="X", help=scale)
    add("--guidance", metavar="NAME", default="cfg", help="cfg, apg, pag or cfg_zero (cfg)")
    add("--guidance-rescale", type=float, metavar="X", help="0 to 1: against too much contrast at high scales (0)")
    interval = {"type": float, "nargs": 2, "metavar": ("FROM", "TO")}
    add("--guidance-interval", **interval, help="guide only in this part of the steps, 0 to 1")
    add("--guidance-sigma-interval", **interval, help="or only between these sigmas")
    for kind, entry in GUIDANCES.items():
        for name, own in entry.options.items():
            shown = ",".join(own) if isinstance(own, tuple) else "1 for flow models" if own is None else f"{own:g}"
            option = f"--{name.replace('_', '-')}"
            add(option, type=OPTION_TYPES.get(name, float), metavar="X", help=f"of {kind} ({shown})")
    add(*names_of("sampler"), metavar="NAME", help=f"see --help-samplers (the model's, or {SAMPLER})")
    add(*names_of("spacing"), metavar="NAME", help="trailing, karras, …: see --help-samplers (the model's)")
    add(
        "--timesteps", type=_numbers, metavar="N,N,…", help="the timesteps themselves, descending, instead of a spacing"
    )
    add("--sigmas", type=_numbers, metavar="X,X,…", help="or the sigmas")
    add("--eta", type=float, metavar="X", help="0 to 1: the noise of samplers that add as much as they are told to")
    add("--clip-skip", type=int, metavar="N", help="layers of CLIP to leave out; 1 is A1111's 'Clip skip: 2' (0)")
    add("--emphasis", metavar="NAME", default="original", help="how (word:1.3) acts: original or no_norm (original)")
    add("--help-samplers", action=HelpSamplers, nargs=0, help="list samplers and spacings with all their names")


def add_editing(parser: argparse.ArgumentParser) -> None:
    """What an image is drawn from, and around it: all of EDITING_WORDS."""
    add = parser.add_argument_group("editing").add_argument
    add(*names_of("image"), metavar="IMAGE", help="begin at this image; its size is drawn")
    add(
        *names_of("mask_image"),
        metavar="IMAGE",
        help="of its size: white is painted, where it is black nothing changes",
    )
    add(*names_of("strength"), type=float, metavar="X", help="0 to 1: how much of the steps is run (0.8; outpaint: 1)")
    add("--outpaint", type=_sides, metavar="SIDE=PIXELS,…", help="make it larger: left=64,right=…,top=…,bottom=…")
    add(*names_of("variation_seed"), type=int, metavar="N", help="mix in this seed's noise; image k of -n has N + k")
    add(*names_of("variation_strength"), type=float, metavar="X", help="0 to 1: how much of it")
    add(*names_of("hires_scale"), type=float, metavar="X", help="draw, make X times larger, and draw on")
    add(*names_of("hires_steps"), type=int, metavar="N", help="of the second time (as many as of the first)")
    add(*names_of("hires_strength"), type=float, metavar="X", help="0 to 1: how much of these is run (0.7)")
    tiling = "whether the VAE works in tiles: yes, no, auto (auto: above 1024x1024)"
    add("--vae-tiling", type=_tiling, default="auto", metavar="WHEN", help=tiling)


def add_model(parser: argparse.ArgumentParser) -> None:
    """What it is drawn with: all of MODEL."""
    add = parser.add_argument_group("model").add_argument
    model = "a diffusers folder, a .safetensors file or a hub id (the shipped model)"
    add("--model", metavar="MODEL", default="default", help=model)
    add("--vae", metavar="PATH", help="another VAE's folder or file")
    add("--prediction-type", metavar="NAME", help="epsilon, v_prediction, sample (what the model says)")
    several = "a LoRA or DoRA; may be given several times"
    add("--lora", metavar="FILE[:WEIGHT]", action="append", type=_lora, help=several)
    add("--lora-dir", metavar="FOLDER", help="where <lora:name:0.8> in the prompt finds name.safetensors")
    add("--allow-unapplied", action="store_true", help="warn of a LoRA's keys that fit nowhere, instead of refusing it")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", metavar="NAME", default="auto", help="auto, fp32, bf16, fp16")
    add("--offload", action="store_true", help="keep parts in main memory, on the GPU only while they work")
    add("--attention", metavar="NAME", default="auto", help="of the U-Net: auto, sdpa, chunked, xformers")


def names_of(name: str) -> list[str]:
    """--name, then every word that ALIASES takes for it (those of one letter are left to prompt files)."""
    words = [name, *(word for word, own in ALIASES.items() if own == name and len(word) > 1 and word != "generator")]
    return [f"--{word.replace('_', '-')}" for word in dict.fromkeys(words)]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r:.80}") from None


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


OPTION_TYPES = {"pag_layers": _names, "zero_init_steps": int}


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a colon in the name is no weight unless a number follows."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0
