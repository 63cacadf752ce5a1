"""How much memory the weights of SD3 and FLUX take, and where, told from shapes before any weight is read. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

WIDTH = 2  # bytes of a number: GPUs draw in 16 bits
BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.")
NETWORK = "transformer"

Shapes = Mapping[str, tuple[int, ...]]


def memory_of(shapes: Mapping[str, Shapes]) -> dict[str, Any]:
    """Bytes of a model's weights in 16 bits; `shapes` is component -> name -> shape.

    parts: of each component. block, around: of the transformer's largest block, and of what is not in a block.
    device: at most at once on the GPU, with neither option, with `offload` and with `offload_blocks`; the last two keep
    all weights (the sum of the parts) in main memory. Activations come on top.
    """
    parts = {part: WIDTH * sum(map(prod, of_part.values())) for part, of_part in shapes.items()}
    blocks: Counter[str] = Counter()
    for name, shape in shapes[NETWORK].items():
        match = BLOCK.match(name)
        blocks[match[1] if match else ""] += WIDTH * prod(shape)
    around, largest = blocks.pop("", 0), max(blocks.values(), default=0)
    texts = sum(size for part, size in parts.items() if part.startswith("text_encoder"))
    others = max(texts, parts.get("vae", 0))  # text encoders work together
    device = {"all": sum(parts.values()), "offload": max(parts[NETWORK], others)}
    device["offload_blocks"] = max(around + largest, others)
    return {"parts": parts, "block": largest, "around": around, "device": device}


def memory_lines(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(heading, text) of each line of the report."""
    device, total = memory["device"], gigabytes(sum(memory["parts"].values()))
    text = sum(size for part, size in memory["parts"].items() if part.startswith("text_encoder"))
    lent = f"one block and what is around them {gigabytes(memory['around'] + memory['block'])}"
    return [
        ("memory", f"weights of these parts in 16 bits, without activations: {gigabytes(device['all'])} on the GPU"),
        ("  --offload", f"{gigabytes(device['offload'])} on the GPU at once, {total} in main memory"),
        (
            "  --offload-blocks",
            f"{gigabytes(device['offload_blocks'])} on the GPU at once (text encoders {gigabytes(text)}, {lent}), "
            f"{total} in main memory",
        ),
    ]


def gigabytes(size: float) -> str:
    """1.23 GB, of so many bytes."""
    return f"{size / 1e9:.2f} GB"
