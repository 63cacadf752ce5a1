"""What cross-attention looks at: how much of each place's attention goes to each token of the text.

Hertz et al. 2022 (prompt-to-prompt) and Tang et al. 2023 (DAAM): the mean over heads and layers of softmax(q kᵀ).

Shapes:  B rows   C channels   L = H*W places of a layer   S text tokens   h, w latent size
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.attention import MASKED
from ldm.nn.unet import Attention, TransformerBlock, UNet

Layers = dict[str, Tensor]  # a layer's name -> (B, L, S), of the U-Net's last call


@contextmanager
def recorded(unet: UNet) -> Iterator[Layers]:
    """While the block runs, each call of `unet` fills the mapping with the attention of its cross-attention layers.

    It is computed a second time beside the layer's own, so that the U-Net's output keeps its bits. Give it a U-Net that
    nobody else calls meanwhile (`ldm.nn.lora.clone_shared_weights` makes one).
    """
    layers: Layers = {}
    handles = []
    for name, block in unet.named_modules():
        if isinstance(block, TransformerBlock):

            def record(module, inputs, output, name=f"{name}.attn2"):
                layers[name] = probabilities(module, *inputs[:3])

            handles.append(block.attn2.register_forward_hook(record))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probabilities(layer: Attention, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(head size)), its mean over the heads: x (B, L, C), context (B, S, D) -> (B, L, S) fp32."""
    q, k = layer.to_q(x).float(), layer.to_k(context).float()
    q, k = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k))  # (B, heads, tokens, head size)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], MASKED)
    return scores.softmax(-1).mean(1)


def averaged(layers: Layers, row: int, height: int, width: int) -> Tensor:
    """(S, h, w): the mean over all layers for one row, each brought to the latents' size. The sum over S is 1."""
    maps = []
    for found in layers.values():
        rows, columns = _size(found.shape[1], height, width)
        small = found[row].T.unflatten(-1, (rows, columns))  # (S, H, W)
        maps.append(F.interpolate(small[None], (height, width), mode="bilinear", align_corners=False)[0])
    return torch.stack(maps).mean(0)


def _size(places: int, height: int, width: int) -> tuple[int, int]:
    """The size of the level that has so many places: the latents', halved and rounded up until it fits."""
    while height * width > places:
        height, width = -(-height // 2), -(-width // 2)
    return height, width
