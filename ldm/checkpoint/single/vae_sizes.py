"""The settings of an autoencoder in a file without them, from its tensors: all except the scale of its latents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm.errors import ModelError

GROUPS = 32  # of group normalisation, which the tensors do not tell: those of every known autoencoder
LEVEL = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv2\.weight")


def vae_sizes(shapes: Mapping[str, tuple[int, ...]], path: object) -> dict[str, Any]:
    """config.json of the autoencoder with these tensors, by original or diffusers' names without a prefix.

    Raises ModelError where it is no AutoencoderKL, or of a width that its normalisation cannot have.
    """
    resnets = {(int(m[1]), int(m[2])): shape[0] for name, shape in shapes.items() if (m := LEVEL.fullmatch(name))}
    ends = [shapes.get(f"{side}.conv_in.weight", ()) for side in ("encoder", "decoder")]
    out = shapes.get("decoder.conv_out.weight", ())
    levels = 1 + max((level for level, _ in resnets), default=-1)
    widths = [resnets.get((level, 0), 0) for level in range(levels)]
    if not all(widths) or not levels or any(len(shape) != 4 for shape in (*ends, out)):
        raise ModelError("holds no whole autoencoder (AutoencoderKL)", where=path)
    if odd := [width for width in widths if width % GROUPS]:
        what = f"is an autoencoder of width {odd[0]}, whose groups of normalisation its file does not tell"
        raise ModelError(what, where=path, hint="give its folder, with config.json")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": ends[0][1],
        "out_channels": out[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": sum(level == 0 for level, _ in resnets),
        "latent_channels": ends[1][1],
        "norm_num_groups": GROUPS,
        "act_fn": "silu",
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(re.match(r"encoder\.mid(_block)?\.att", name) for name in shapes),
    }
