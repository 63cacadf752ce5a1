"""Parts on the device only while they work: a copy goes there, works and is forgotten; the part itself stays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ldm.nn.lora import clone_shared_weights

Part = TypeVar("Part")  # a module, or an object that holds some, as VAE and the text encoders do


@contextmanager
def at_work(part: Part, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Part]:
    """`part` on `device` (and in a dtype) while the block runs.

    What is lent is a copy whose weights are freed afterwards. The part stays as it is, so that others may use it at
    the same time, and nothing has to be brought back.
    """
    yield moved(part, device, dtype)


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
