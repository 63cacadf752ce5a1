"""Parts on the device only while they work: a copy goes there, works and is forgotten; the part itself stays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.nn.lora import clone_shared_weights
from ldm.nn.mmdit import MMDiT
from ldm.nn.quantization import stored_bytes

Part = TypeVar("Part")  # a module, or an object that holds some, as VAE and the text encoders do


class BlockLender:
    """Lends a network's blocks to a device, each while it works, and counts the bytes that it has placed there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.placed = 0  # bytes, now
        self.most = 0  # at once, so far

    @contextmanager
    def __call__(self, block: nn.Module) -> Iterator[nn.Module]:
        """`block` on the device while the block of the caller runs."""
        size = sum(map(stored_bytes, (*block.parameters(), *block.buffers())))
        self.placed += size
        self.most = max(self.most, self.placed)
        try:
            yield clone_shared_weights(block).to(self.device)
        finally:
            self.placed -= size


def with_lent_blocks(network: MMDiT, device: torch.device) -> MMDiT:
    """A copy of a flow transformer that is on `device` but for its blocks, which go there one at a time.

    The blocks stay where they are, so that the device holds the largest block, what is around the blocks, and
    activations. Each call of the network carries all blocks over once.
    """
    new = clone_shared_weights(network)
    for child in new.children():
        if not isinstance(child, nn.ModuleList):
            child.to(device)
    new.lend = BlockLender(device)
    return new


@contextmanager
def at_work(part: Part, device: torch.device, dtype: torch.dtype | None = None, blocks: bool = False) -> Iterator[Part]:
    """`part` on `device` (and in a dtype) while the block runs; with `blocks` those of a flow transformer one by one.

    What is lent is a copy whose weights are freed afterwards. The part stays as it is, so that others may use it at
    the same time, and nothing has to be brought back.
    """
    lent: Any = with_lent_blocks(part, device) if blocks and isinstance(part, MMDiT) else moved(part, device, dtype)
    yield lent


def moved(part: Part, device: torch.device, dtype: torch.dtype | None = None) -> Part:
    """A copy of `part` with all its weights on `device` (and in a dtype); what is there already is shared."""
    if isinstance(part, nn.Module):
        if device.type == "cuda" and next(part.parameters()).device != device:
            torch.cuda.empty_cache()  # what the part before this one held
        return clone_shared_weights(part).to(device, dtype)
    new = copy.copy(part)
    for name, value in vars(part).items():
        if isinstance(value, nn.Module) or hasattr(value, "modules"):  # an encoder within an encoder
            setattr(new, name, moved(value, device, dtype))
    return new
