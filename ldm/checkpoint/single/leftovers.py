"""Tensors of a single file that no part of the model asks for: harmless ones are left out, and told; others refused.

Exporters leave tables of the sampling, unused towers and position ids behind. Only tensors inside a network, and the
scales of quantised weights, say that the file is another model than it was taken for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.checkpoint.single.names import FLUX_VAE, UNET, VAE
from ldm.errors import ModelError

SHOWN = 5  # names of keys that a message lists
QUANTISED = {  # what marks weights that need their scales -> its name
    "scaled_fp8": "scaled fp8 (scaled_fp8)",
    ".scale_weight": "scaled fp8 (scale_weight)",
    ".scale_input": "scaled fp8 (scale_input)",
    ".weight_scale": "quantised weights (weight_scale)",
    ".comfy_quant": "quantised weights (comfy_quant)",
    ".absmax": "bitsandbytes' 4-bit weights (absmax)",
    ".quant_map": "bitsandbytes' 4-bit weights (quant_map)",
    ".qweight": "quantised weights (qweight)",
}
# What a network computes with: a tensor of this kind without a place means a network of another shape.
INSIDE = re.compile(
    rf"{re.escape(UNET)}.*(weight|bias)$"
    r"|(double|single|joint)_blocks\.\d+\."
    rf"|({re.escape(VAE)}|{re.escape(FLUX_VAE)})(encoder|decoder|quant_conv|post_quant_conv)\."
    r"|text_encoders\.(?!.*vision).*(layers|block)\.\d+\..*(weight|bias)$"
    r"|(cond_stage_model|conditioner)\.(?!.*vision).*(layers|resblocks)\.\d+\..*(weight|bias)$"
)


def refused(unknown: Sequence[str]) -> list[str]:
    """Those of the keys that belong inside a network."""
    return [key for key in unknown if INSIDE.match(key)]


def check_quantised(keys: Sequence[str], where: Path) -> None:
    """Raise ModelError, by its name, for a way of storing weights that is not supported."""
    for mark, title in QUANTISED.items():
        if any(key == mark or key.endswith(mark) for key in keys):
            hint = "get the file in fp16, bf16 or fp32"
            raise ModelError(f"holds {title}, which is not supported", where=where, hint=hint)


def check_leftovers(unknown: Sequence[str], where: Path) -> None:
    """Raise ModelError for keys without a place that are no leftovers."""
    check_quantised(unknown, where)
    if inside := refused(unknown):
        names = ", ".join(inside[:SHOWN]) + (", ..." if len(inside) > SHOWN else "")
        raise ModelError(f"has {len(inside)} keys that belong to no part of the model ({names})", where=where)


def groups(unknown: Sequence[str]) -> Mapping[str, int]:
    """How many leftovers there are, by the beginning of their names."""
    return Counter(f"{key.split('.')[0]}.*" if "." in key else key for key in unknown)


def told(unknown: Sequence[str]) -> str:
    """The line about what is left out."""
    names = ", ".join(unknown[:SHOWN]) + (", …" if len(unknown) > SHOWN else "")
    return f"{len(unknown)} tensor{'s' * (len(unknown) > 1)} that the model has no use for: {names}"
