"""How much memory a model's weights take, and where, told from shapes before any weight is read. No torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ldm.checkpoint import folder as layouts
from ldm.checkpoint import single
from ldm.checkpoint.model import is_single, resolve, resolve_vae
from ldm.checkpoint.safety import read_header
from ldm.files import format_bytes

WIDTH = 2  # bytes of a number: GPUs draw in 16 bits
ROW = 5  # bytes beside a row in int8: torchao's scale and zero point
BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.")
OFFLOADS = {False: "all", True: "offload", "blocks": "offload_blocks"}  # `offload` of Pipeline -> key of `device`

Shapes = Mapping[str, tuple[int, ...]]


def weight_shapes(
    model: str | os.PathLike, vae: str | os.PathLike | None = None, text_encoders: Any = None
) -> dict[str, Shapes]:
    """Component -> name -> shape of all that loading reads, from headers alone; arguments as load_model has them."""
    path, skip = resolve(model), () if vae is None else ("vae",)
    if is_single(path):
        plan = single.plan_of(path, "epsilon", skip, strict=False, texts=single.listed_texts(text_encoders))
        found = {part: plan.shapes(part) for part in plan.configs if part != "scheduler"}
    else:
        layout = layouts.read_layout(path, skip)
        found = {part: _in_files(layout.shards(part)) for part in layout.weights}
    if vae is not None:
        place = resolve_vae(vae)
        alone = is_single(place)
        found["vae"] = single.vae_shapes(place) if alone else _in_files(layouts.vae_layout(place).shards("vae"))
    return {part: shapes for part, shapes in found.items() if shapes}


def _in_files(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for path in paths for name, tensor in read_header(path).tensors.items()}


def memory_of(shapes: Mapping[str, Shapes], width: int = WIDTH, quantization: str | None = None) -> dict[str, Any]:
    """Bytes of a model's weights, of `width` each; `shapes` is component -> name -> shape. With `quantization` a number
    in the blocks' linear layers takes one, and each of their rows ROW more.

    parts: of each component. block, around: of the network's largest block, and of what is not in a block; a U-Net has
    none. device: at most at once on the GPU, with neither option, with `offload` and with `offload_blocks`; the last
    two keep all weights (the sum of the parts) in main memory. Activations come on top.
    """
    parts = {part: width * sum(map(prod, of_part.values())) for part, of_part in shapes.items()}
    network = "transformer" if "transformer" in parts else "unet"
    blocks: Counter[str] = Counter()
    for name, shape in shapes[network].items():
        match = BLOCK.match(name)
        eight = quantization and match and len(shape) == 2
        blocks[match[1] if match else ""] += prod(shape) + ROW * shape[0] if eight else width * prod(shape)
    parts[network] = sum(blocks.values())
    around, largest = blocks.pop("", 0), max(blocks.values(), default=0)
    texts = sum(size for part, size in parts.items() if part.startswith("text_encoder"))
    others = max(texts, parts.get("vae", 0))  # text encoders work together
    device = {"all": sum(parts.values()), "offload": max(parts[network], others)}
    device["offload_blocks"] = max(around + largest, others)
    return {"parts": parts, "block": largest, "around": around, "device": device}


def memory_lines(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(heading, text) of each line of the report."""
    whole = f"{format_bytes(memory['device']['all'])} on the GPU"
    return [
        ("memory", f"weights of these parts in 16 bits, without activations: {whole}"),
        ("  --offload", offload_line(memory, True)),
        ("  --offload-blocks", offload_line(memory, "blocks")),
    ]


def offload_line(memory: Mapping[str, Any], offload: bool | str) -> str:
    """How much is on the GPU at once, and how much in main memory, with `offload` as Pipeline has it."""
    at_once = format_bytes(memory["device"][OFFLOADS[offload]])
    total = format_bytes(sum(memory["parts"].values()))
    text = sum(size for part, size in memory["parts"].items() if part.startswith("text_encoder"))
    lent = f"one block and what is around them {format_bytes(memory['around'] + memory['block'])}"
    within = f" (text encoders {format_bytes(text)}, {lent})" if offload == "blocks" else ""
    return f"{at_once} on the GPU at once{within}, {total} in main memory"
