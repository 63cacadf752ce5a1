"""The memory that the weights of a fine-tuning of SD3 or FLUX take, by headers alone: said before any is read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ldm.checkpoint.folder import is_hub_id
from ldm.checkpoint.memory import Shapes, weight_shapes
from ldm.console import say
from ldm.device import total_memory
from ldm.errors import ResourceError
from ldm.files import format_bytes
from ldm.training.finetuning.base_model import chosen_layers, frozen_dtype
from ldm.training.settings import FinetuneSettings

TRAINED = 20  # bytes of each number that is trained: itself, gradient, average and two moments in fp32


def check_memory(settings: FinetuneSettings, device: torch.device) -> None:
    """Say what the weights need, where they are on this machine; raise ResourceError where the device has less.

    Activations come on top. All blocks stay on the device in training: none is lent, as in drawing.
    """
    if is_hub_id(settings.model):
        return
    shapes = weight_shapes(settings.model, settings.vae, settings.text_encoders)
    parts = weight_bytes(settings, shapes, device)
    total = sum(parts.values())
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    say(f"memory: the weights take {format_bytes(total)} on {device.type} ({listed}); activations come on top")
    if total > (there := total_memory(device)):
        what = f"the weights need {format_bytes(total)}, and {device.type} has {format_bytes(there)}"
        hint = "train a LoRA, or shard over several GPUs with FSDP2" if settings.train == "full" else None
        raise ResourceError(what, where=settings.model, hint=hint or "shard over several GPUs with FSDP2")


def weight_bytes(settings: FinetuneSettings, shapes: Mapping[str, Shapes], device: torch.device) -> dict[str, int]:
    """Part -> bytes on the device. What is trained takes its gradient, average and moments too."""
    counts = {part: sum(map(math.prod, tensors.values())) for part, tensors in shapes.items()}
    each = frozen_dtype(settings, device).itemsize
    found = {"transformer": counts["transformer"] * (TRAINED if settings.train == "full" else each)}
    found["text encoders"] = sum(count for part, count in counts.items() if part.startswith("text_encoder")) * each
    found["VAE"] = counts.get("vae", 0) * torch.float32.itemsize
    if settings.train != "full" and not settings.init:
        ends = ".weight"
        layers = {n.removesuffix(ends): s for n, s in shapes["transformer"].items() if n.endswith(ends) and len(s) > 1}
        chosen = chosen_layers({"unet": layers}, settings.targets, settings.lora_rank)["unet"]
        sides = sum(layers[name][0] + math.prod(layers[name][1:]) for name in chosen)
        found["updates"] = settings.lora_rank * sides * TRAINED
    return found
