"""The weights of a flow transformer's blocks in 8 bits, by torchao: half the memory of 16 bits, at a small loss.

Each row of a linear layer is whole numbers from -127 to 127 and one scale; products are computed in the dtype of the
rest ("weight only"), so that an image's bits do not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.nn.mmdit import MMDiT

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")  # beginnings of names; what is around them stays


def quantized(network: MMDiT, device: torch.device) -> MMDiT:
    """The transformer on `device`, changed in place: layer by layer, so that one at a time is there in 16 bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig(), filter_fn=_is_quantized, device=device)
    return network.to(device)


def _is_quantized(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith(BLOCKS)


def stored_bytes(tensor: Tensor) -> int:
    """The bytes that a tensor takes; of one in 8 bits those of its numbers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)
