"""A network that one process trains, and tensors that may be sharded over several."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ldm.training.distributed.alone import ALONE, Alone
from ldm.training.loop.stage import Stage

SHARDED = "full_tensor"  # what tells a DTensor without importing its module


class Single:
    """A network that one process trains."""

    def __init__(self, group: Alone = ALONE):
        self.group = group

    def loss(self, stage: Stage, batch: Any, step: int, micro: int) -> Tensor:
        """The stage's loss on this process's rows; its backward pass gives the gradients of all rows."""
        return stage.loss(batch, step, micro)

    def micro(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and a backward pass; gradients are exchanged in the `last` one of a step."""
        return nullcontext()

    def settle(self) -> None:
        """After forward passes that no backward pass followed."""

    def gathered(self, module: nn.Module) -> nn.Module:
        """`module` with all of its weights: on every process at once, of use on the first one."""
        return module


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a shard of it."""
    return any(hasattr(parameter, SHARDED) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, others unchanged. Every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, SHARDED) else tensor


def like(value: Tensor, own: Tensor) -> Tensor:
    """Shard `value`, which every process has in full, as `own` is sharded."""
    if not hasattr(own, SHARDED):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(own.to_local().device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards."""
    return [tensor.to_local() if hasattr(tensor, SHARDED) else tensor for tensor in tensors]
