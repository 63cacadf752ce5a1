"""More averages of the weights than the one that is kept anyway, each with a decay of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.checkpoints.state import trainable
from ldm.training.distributed.alone import local


def averages_of(ema: nn.Module, module: nn.Module) -> dict[str, Tensor]:
    """What is averaged, by name: copies in the layout of `ema`."""
    own = dict(ema.named_parameters())
    return {name: own[name].detach().clone() for name in trainable(module)}


@torch.no_grad()
def update_average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · module of what is trained, in place."""
    new = trainable(module)
    torch._foreach_lerp_(local(average.values()), local(new[name] for name in average), 1 - decay)


@contextmanager
def averaged(ema: nn.Module, average: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """`ema` with the weights of another average, inside of the block."""
    own = dict(ema.named_parameters())
    before = {name: own[name].data for name in average}
    try:
        for name, value in average.items():
            own[name].data = value
        yield ema
    finally:
        for name, data in before.items():
            own[name].data = data
