"""A network that several processes train: by DDP, or by FSDP2, which shards every tensor over the processes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.distributed.alone import Alone, Single, whole
from ldm.training.loop.stage import Stage


class _Loss(nn.Module):
    """A stage's loss as the forward pass of a module, as DDP needs it."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.module = stage.module
        self.stage = stage

    def forward(self, batch: Any, step: int, micro: int) -> Tensor:
        return self.stage.loss(batch, step, micro)


class _Replicated(Single):
    """DDP: every process has all weights."""

    def __init__(self, group: Alone, stage: Stage):
        super().__init__(group)
        unused = isinstance(stage.module, nn.ModuleDict)  # the ends of text encoders
        self.ddp = nn.parallel.DistributedDataParallel(_Loss(stage), find_unused_parameters=unused)

    def loss(self, stage: Stage, batch: Any, step: int, micro: int) -> Tensor:
        return self.ddp(batch, step, micro)

    def micro(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.ddp.no_sync()


class _Sharded(Single):
    """FSDP2 (Zhao et al. 2023): every process holds a shard of each tensor and gathers a layer while it computes."""

    def __init__(self, group: Alone, modules: Iterable[nn.Module], device: torch.device):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(group)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody writes into
        self.mesh = init_device_mesh(device.type, (group.world,))
        self.roots, self._bare = [], {}
        for module in modules:
            self._bare[module] = _bare(module)
            for root in module.values() if isinstance(module, nn.ModuleDict) else [module]:
                for layer in _layers(root):
                    fully_shard(layer, mesh=self.mesh)
                self.roots.append(fully_shard(root, mesh=self.mesh))

    def micro(self, last: bool) -> AbstractContextManager[None]:
        for root in self.roots:
            root.set_requires_gradient_sync(last)
        return nullcontext()

    def settle(self) -> None:
        for root in self.roots:  # which keep what they gathered, for a backward pass
            root.reshard()

    def gathered(self, module: nn.Module) -> nn.Module:
        found = {}
        for name, value in module.state_dict().items():
            value = whole(value)
            found[name] = value.cpu() if self.group.first else torch.empty(0)
        bare = copy.deepcopy(self._bare[module])
        if self.group.first:
            bare.load_state_dict(found, assign=True)
        return bare.eval()


def wrap_module(group: Alone, stage: Stage, ema: nn.Module, device: torch.device) -> Single:
    """Wrap the stage's network on `device` and its average for several processes, before the optimizer is made."""
    if group.sharded:
        return _Sharded(group, [stage.module, ema], device)
    return _Replicated(group, stage)


def _bare(module: nn.Module) -> nn.Module:
    """A copy without memory for its parameters."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def _layers(module: nn.Module) -> Iterable[nn.Module]:
    """The outermost layers in module lists that have a forward; FSDP2 gathers one of them at a time."""
    for child in module.children():
        called = [layer for layer in child if _is_called(layer)] if isinstance(child, nn.ModuleList) else []
        yield from called or _layers(child)


def _is_called(layer: nn.Module) -> bool:
    return type(layer).forward is not nn.Module.forward and any(True for _ in layer.parameters())
