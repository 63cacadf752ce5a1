"""Muon for the matrices of hidden layers, with AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import require
from ldm.device import fast_bf16
from ldm.nn.lora import LoraLayer
from ldm.training.checkpoints.state import trainable
from ldm.training.settings import Settings

TEXT = "text."  # the beginning of the names of a text encoder that is trained along with a U-Net
# What touches the data, and no hidden layer: Muon's authors leave such to AdamW. Of U-Nets; of flow transformers.
ENDS = ("conv_in", "conv_out")
OUTER = ("pos_embed.proj", "x_embedder", "proj_out")
MOMENTUM, ROUNDS = 0.95, 5
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of Newton and Schulz's iteration: Jordan et al. 2024
SMALLEST = 1e-7  # norm that is divided by
STACKED = 1 << 26  # numbers of matrices that are moved at once


def muon(
    settings: Settings,
    module: nn.Module,
    device: torch.device,
    groups: Callable[[Settings, Mapping[str, nn.Parameter]], list[dict[str, Any]]],
    adamw: Callable[..., torch.optim.AdamW],
) -> Muon:
    """Muon for what it moves of `module`, AdamW for the `groups` of all else that is trained."""
    parameters, moved = trainable(module), moved_names(settings, module)
    matrices = [p for name, p in parameters.items() if name in moved]
    require(bool(matrices), "muon moves matrices, and none is trained: use adamw", "optimizer")
    others = groups(settings, {name: p for name, p in parameters.items() if name not in moved})
    return Muon(matrices, others, settings.learning_rate, settings.weight_decay, partial(adamw, settings, device))


def moved_names(settings: Settings, module: nn.Module) -> set[str]:
    """The names of what Muon moves; a text encoder with a rate of its own is left to AdamW."""
    apart = getattr(settings, "text_rate", 0)
    return {name for name in hidden_names(module) if not (apart and name.startswith(TEXT))}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for `matrices`, AdamW for the groups `others`, with one learning rate.

    To the bit torch.optim.Muon where bf16 is fast; elsewhere its iteration runs in fp32, since emulated bf16 takes ten
    times as long. A convolution counts as its matrix (out, in * k * k). Updates are scaled to the size of AdamW's (Liu
    et al. 2025, section 2.2), so that learning rate and weight decay mean the same in both. The momentum is kept in the
    shape of its parameter, so that a checkpoint does not depend on the layout in memory.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[dict[str, Any]],
        lr: float,
        weight_decay: float,
        adamw: Callable[..., torch.optim.AdamW],
    ):
        super().__init__([{"params": list(matrices)}], {"lr": lr, "weight_decay": weight_decay})
        self.dtype = torch.bfloat16 if fast_bf16(matrices[0].device) else torch.float32
        self.adamw = adamw(others)
        self.adamw.state = self.state
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        group, alike = self.param_groups[0], {}
        for p in group["params"]:
            if p.grad is not None:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                alike.setdefault((len(p), p[0].numel()), []).append(p)
        for (rows, columns), found in alike.items():
            most = max(1, STACKED // (rows * columns))
            for start in range(0, len(found), most):
                self._move(found[start : start + most], group["lr"], group["weight_decay"])
        self.adamw.step()

    def _move(self, alike: Sequence[nn.Parameter], rate: float, weight_decay: float) -> None:
        """Matrices of one shape, all at once: a GPU then gets a fraction of the work orders."""
        gradients, momenta = [p.grad for p in alike], [self.state[p]["momentum_buffer"] for p in alike]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        stack = torch.stack([as_matrix(update, p) for update, p in zip(updates, alike)])
        updates = orthogonalized(stack, self.dtype).to(stack.dtype).unbind()
        matrices = [as_matrix(p.detach(), p) for p in alike]  # views
        torch._foreach_mul_(matrices, 1 - rate * weight_decay)
        torch._foreach_add_(matrices, updates, alpha=-rate * (0.2 * math.sqrt(max(stack.shape[1:]))))


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, rows, columns) with all singular values of each brought near to 1 (0.7 to 1.2), computed in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def as_matrix(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """(out, in, k, k) → (out, in * k * k), columns in the order in which `parameter` lies in memory: a view of it."""
    if tensor.ndim == 2 or parameter.is_contiguous():
        return tensor.flatten(1)
    return tensor.permute(0, 2, 3, 1).flatten(1)  # channels last


def hidden_names(module: nn.Module) -> set[str]:
    """The names of the matrices that Muon moves: weights of hidden layers, and the low-rank factors of updates."""
    names = set()
    for name, layer in module.named_modules():
        outer = name.rpartition(".")[2] in ENDS or name.removeprefix("unet.") in OUTER
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not outer:
            names.add(f"{name}.weight")
        elif isinstance(layer, LoraLayer):
            names |= {f"{name}.down", f"{name}.up"}
    return names
