"""Muon for the matrices of hidden layers, with AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.lora import LoraLayer

ENDS = ("conv_in", "conv_out")  # they touch the data, not a hidden layer: Muon's authors leave such to AdamW


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, torch's own) for `matrices`, AdamW for the groups `others`, with one learning rate.

    A convolution counts as its matrix (out, in * k * k). Updates are scaled to the size of AdamW's (Liu et al. 2025,
    section 2.2), so that learning rate and weight decay mean the same in both. The momentum is kept in the shape of
    its parameter, so that a checkpoint does not depend on the layout in memory.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[dict[str, Any]],
        lr: float,
        weight_decay: float,
        adamw: Callable[..., torch.optim.AdamW],
    ):
        super().__init__([{"params": list(matrices)}], {"lr": lr})
        self.adamw = adamw(others)
        self.adamw.state = self.state
        self.flat = [as_matrix(p.detach(), p) for p in matrices]  # views: they share the parameters' memory
        self.muon = torch.optim.Muon(self.flat, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.param_groups += [*self.adamw.param_groups, *self.muon.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        for p, flat in zip(self.param_groups[0]["params"], self.flat):
            flat.grad = None if p.grad is None else as_matrix(p.grad, p)
            if p.grad is not None:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                self.muon.state[flat]["momentum_buffer"] = as_matrix(momentum, p)
        self.muon.step()
        self.adamw.step()


def as_matrix(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """(out, in, k, k) → (out, in * k * k), columns in the order in which `parameter` lies in memory: a view of it."""
    if tensor.ndim == 2 or parameter.is_contiguous():
        return tensor.flatten(1)
    return tensor.permute(0, 2, 3, 1).flatten(1)  # channels last


def hidden_names(module: nn.Module) -> set[str]:
    """The names of the matrices that Muon moves: weights of hidden layers, and the low-rank factors of updates."""
    names = set()
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.rpartition(".")[2] not in ENDS:
            names.add(f"{name}.weight")
        elif isinstance(layer, LoraLayer):
            names |= {f"{name}.down", f"{name}.up"}
    return names
