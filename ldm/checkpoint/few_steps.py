"""Few-step files (LCM, Turbo, Lightning, Hyper-SD, DMD2, TCD, PCM, ours) and the settings they were made for; no torch.

What is inside decides: our key in the header, a scheduler's settings, or the layers that distillation changes together
with a name. These LoRAs have the same layers and rank whatever they were distilled by, so that names tell them apart; a
name alone decides nothing and is told.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.checkpoint.lora.read import FILE, WORDS, LoraHeader
from ldm.diffusion import names
from ldm.errors import ConfigError, ModelError, nearest

KEY = "ldm.sampling"  # in the header of our few-step files: JSON of the settings below, all but sampler may be left out
MODEL_KEY = "ldm.model"  # beside it: the hash of the model that was distilled
SETTINGS = ("kind", "sampler", "spacing", "num_inference_steps", "guidance_scale", "eta")
TITLES = ("modelspec.title", "ss_output_name")  # names that a header may hold
DISTILLED_CLASSES = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}
EULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
TURBO_SIZE = 64  # of Turbo's latents: XL's own are 128
TOLD, MOST_TOLD = 8.0, 14.0  # guidance of LCM's U-Nets that are told its scale: their card's, the most they learned
WIDTH_XL = 2048  # of the text that XL's U-Net attends to
# What distillation changes in a U-Net: the ends of layers' names, as diffusers and as the original code have them.
LAYERS = (("conv1", "in_layers_2"), ("time_emb_proj", "emb_layers_1"), ("to_q",), ("to_out_0",), ("ff_net_2",))


@dataclass(frozen=True)
class Sampling:
    """How a few-step file wants to be drawn with."""

    kind: str
    sampler: str
    num_inference_steps: int = 4
    spacing: str | None = None  # None: the sampler's or the schedule's own
    guidance_scale: float = 1.0  # 1: none
    eta: float | None = None
    most_guidance: float = 1.0  # above, colours burn
    most_steps: int = 8  # above, nothing is gained or the image breaks
    least_steps: int = 1
    others: tuple[str, ...] = ()  # samplers that do as well

    @property
    def defaults(self) -> dict[str, Any]:
        """generate's settings, as a model's card gives them; those that are None are left to the model."""
        found = {name: getattr(self, name) for name in SETTINGS[1:]}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        steps = "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        guidance = "no guidance" if self.guidance_scale <= 1 else f"guidance {self.guidance_scale:g}"
        return f"{' '.join(filter(None, (self.sampler, self.spacing)))}, {steps}, {guidance}"

    @property
    def options(self) -> str:
        """The same as options of the command line."""
        spacing = f" --spacing {self.spacing}" if self.spacing else ""
        steps, scale = self.num_inference_steps, self.guidance_scale
        return f"--sampler {self.sampler}{spacing} --steps {steps} --guidance-scale {scale:g}"

    def remarks(self, given: Mapping[str, Any]) -> list[str]:
        """A line for each of generate's keywords whose value cannot work with such a file; None is not given."""
        lines = []
        scale, steps, sampler = (given.get(name) for name in ("guidance_scale", "num_inference_steps", "sampler"))
        scale = max(scale, default=None) if isinstance(scale, list | tuple) else scale
        if scale is not None and scale > self.most_guidance:
            most = "without guidance" if self.most_guidance <= 1 else f"for guidance up to {self.most_guidance:g}"
            lines.append(f"{self.kind} was made {most}: with {scale:g} colours burn")
        if steps is not None and not self.least_steps <= steps <= self.most_steps:
            lines.append(f"{self.kind} was made for {self.num_inference_steps} steps, not {steps}")
        if sampler is not None and names.resolve(sampler)[0] not in (self.sampler, *self.others):
            lines.append(f"{self.kind} was made for the sampler {self.sampler}: {sampler} may draw rubbish")
        return lines


# What the authors' model cards say of each kind; of LCM's own U-Nets see TOLD.
KINDS = {
    "LCM": Sampling("LCM", "lcm", most_guidance=2.0, others=("tcd",)),
    "TCD": Sampling("TCD", "tcd", most_guidance=2.0, most_steps=50, others=("ddim",)),
    "Turbo": Sampling("Turbo", "euler_ancestral", spacing="trailing", most_steps=4, others=("euler", "ddim", "lcm")),
    "Lightning": Sampling("Lightning", "euler", spacing="trailing", others=("ddim",)),
    "Hyper-SD": Sampling("Hyper-SD", "ddim", spacing="trailing", others=("euler", "tcd")),
    "DMD2": Sampling("DMD2", "lcm", spacing="trailing"),
    "PCM": Sampling(
        "PCM", "tcd", spacing="trailing", most_guidance=4.0, others=("ddim", "euler")
    ),  # as its demo has it
}
NAMES = {  # in this order: "pcm_lcmlike" is a PCM
    kind: re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z])")
    for kind, pattern in (
        ("PCM", "pcm"),
        ("DMD2", "dmd2?"),
        ("Hyper-SD", "hyper[-_ ]?sd(?:xl)?"),
        ("Lightning", "lightning"),
        ("Turbo", "turbo"),
        ("TCD", "tcd"),
        ("LCM", "lcm"),
    )
}
STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True)
class Found:
    """What a file is, or may be."""

    sampling: Sampling | None  # None: nothing inside is sure
    line: str  # one line to tell of it
    doubtful: bool = False  # whether its name says more than what is inside


def named(*texts: str) -> Sampling | None:
    """The kind that names speak of, with the number of steps that they give ("4step"); None for other names."""
    text = " ".join(texts).lower()
    kind = next((kind for kind, pattern in NAMES.items() if pattern.search(text)), None)
    if kind is None:
        return None
    found, match = KINDS[kind], STEPS.search(text)
    if match and 1 <= int(match[1]) <= 16:
        steps = int(match[1])
        found = dataclasses.replace(found, num_inference_steps=steps, least_steps=steps, most_steps=2 * steps)
    if kind == "Hyper-SD" and found.num_inference_steps == 1 and match:  # its one-step file alone is a TCD
        return dataclasses.replace(found, sampler="tcd", spacing=None, eta=1.0, others=())
    if kind == "Hyper-SD" and re.search(r"(?<![a-z])cfg(?![a-z])", text):
        return dataclasses.replace(found, guidance_scale=5.0, most_guidance=8.0)
    if kind == "PCM" and "lcmlike" in text:
        return dataclasses.replace(found, sampler="lcm", spacing=None, others=("tcd", "ddim"))
    if kind == "PCM" and "normalcfg" in text:
        return dataclasses.replace(found, guidance_scale=7.5, most_guidance=10.0)
    return found


def of_lora(header: LoraHeader) -> Found | None:
    """What a LoRA's header says; None for an ordinary one. Raises ModelError for a malformed `ldm.sampling`."""
    if KEY in header.metadata:
        return _sure(header.path.name, read_key(header.metadata[KEY], header.path), f"by its {KEY}")
    path = header.path
    file = path.parent.name if path.name == FILE else path.stem
    by_name = named(file, *(header.metadata.get(title, "") for title in TITLES))
    layers = _distilled_layers(header)
    if by_name and layers:
        return _sure(path.name, by_name, "by its layers and name")
    if by_name:
        return _by_name(path.name, by_name)
    if layers and not _fine_tuned_here(header):
        what = "changes the layers that few-step LoRAs change; if it is one, its page says sampler, steps and guidance"
        return Found(None, f"{path.name}: {what}")
    return None


def _fine_tuned_here(header: LoraHeader) -> bool:
    """Whether `ldm finetune` wrote it, which also changes such layers; `ldm distill` says so in `ldm.sampling`."""
    return WORDS in header.metadata or header.metadata.get("ss_training_comment", "").startswith("written by ldm")


def of_model(
    name: str, scheduler: Mapping[str, Any], unet: Mapping[str, Any], metadata: Mapping[str, str]
) -> Found | None:
    """What a model's settings (diffusers') and header say; None for an ordinary one. Raises ModelError as of_lora."""
    if KEY in metadata:
        return _sure(name, read_key(metadata[KEY], name), f"by its {KEY}")
    by_name, stepping = named(name), scheduler.get("_class_name", "")
    if stepping in DISTILLED_CLASSES:
        kind = DISTILLED_CLASSES[stepping]
        found = by_name if by_name and by_name.kind == kind else KINDS[kind]
        if unet.get("time_cond_proj_dim"):  # the scale is an input, and no second row
            found = dataclasses.replace(found, guidance_scale=TOLD, most_guidance=MOST_TOLD)
        return _sure(name, found, f"by its {stepping}")
    trailing = stepping in EULERS and scheduler.get("timestep_spacing") == "trailing"
    xl_of_64 = unet.get("cross_attention_dim") == WIDTH_XL and unet.get("sample_size") == TURBO_SIZE
    if trailing and xl_of_64 and not scheduler.get("rescale_betas_zero_snr"):
        return _sure(name, KINDS["Turbo"], "by its size and scheduler")
    if by_name and trailing and by_name.spacing == "trailing":
        return _sure(name, by_name, "by its scheduler and name")
    return _by_name(name, by_name) if by_name else None


def read_key(text: str, where: Any) -> Sampling:
    """The settings in a header's `ldm.sampling`. Raises ModelError where they cannot be understood."""
    try:
        given = json.loads(text)
        if unknown := given.keys() - set(SETTINGS):
            raise ModelError(
                f"{KEY}: unknown setting {min(unknown)!r}", where=where, hint=nearest(min(unknown), SETTINGS)
            )
        sampler, spacing = names.resolve(given["sampler"])
        spacing = names.resolve_spacing(given["spacing"]) if given.get("spacing") else spacing
        steps, scale = int(given.get("num_inference_steps", 4)), float(given.get("guidance_scale", 1.0))
        eta = names.options(sampler, given.get("eta")).get("eta")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, ConfigError) as error:
        what = f"its {KEY} cannot be understood ({error})"
        raise ModelError(what, where=where, hint="get the file again") from None
    if not (0 < steps <= 1000 and 0 < scale <= 1000):
        raise ModelError(f"its {KEY} says {steps} steps, guidance {scale:g}", where=where, hint="get the file again")
    kind = str(given.get("kind") or "a few-step file")
    return Sampling(kind, sampler, steps, spacing, scale, eta, most_guidance=max(1.0, scale), most_steps=2 * steps)


def _distilled_layers(header: LoraHeader) -> bool:
    """Whether all kinds of the U-Net's layers have updates of one rank, no text encoder has, and no trainer's notes."""
    layers = [layer.replace(".", "_") for layer in header.entries]
    if any(layer.startswith(("text_encoder", "lora_te")) for layer in layers):
        return False
    one_rank = len({entry.rank for entry in header.entries.values()}) == 1
    noted = any(key.startswith("ss_network") for key in header.metadata)
    return one_rank and not noted and all(any(layer.endswith(ends) for layer in layers) for ends in LAYERS)


def _sure(name: str, sampling: Sampling, why: str) -> Found:
    return Found(sampling, f"{name}: {sampling.kind} ({why}); where nothing else is given: {sampling}")


def _by_name(name: str, sampling: Sampling) -> Found:
    what = f"its name says {sampling.kind}, nothing inside does; if it is one, give {sampling.options}"
    return Found(None, f"{name}: {what}", doubtful=True)
