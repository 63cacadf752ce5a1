"""More averages of the weights than the one that is kept anyway, each with a decay of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.checkpoints.state import TrainState, trainable
from ldm.training.distributed.alone import SHARDED, local


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
def averaged(state: TrainState, decay: float) -> Iterator[nn.Module]:
    """`state.ema` with the weights of the average of this decay, inside of the block."""
    state.parallel.settle()  # what FSDP2's root keeps of a forward pass is not what it shards
    average, own = state.averages[decay], dict(state.ema.named_parameters())
    before = {name: _kept(own[name]) for name in average}
    try:
        _give(own, average)
        yield state.ema
    finally:
        state.parallel.settle()
        _give(own, before)


def _kept(parameter: Tensor) -> Tensor:
    """What `_give` restores: a copy of a shard, which is written into."""
    return parameter.detach().clone() if hasattr(parameter, SHARDED) else parameter.data


@torch.no_grad()
def _give(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give parameters the memory of these values; a shard, which FSDP2 holds on to, takes a copy."""
    for name, value in values.items():
        if hasattr(value, SHARDED):
            shard, new = local([parameters[name], value])
            shard.copy_(new)
        else:
            parameters[name].data = value
