"""What moves the weights: AdamW, also in 8 bits, SGD, or Muon for the matrices of hidden layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ldm.config import require
from ldm.nn.lora import LoraLayer
from ldm.training.checkpoints.state import TrainState, learned, trainable
from ldm.training.settings import Settings

ENDS = ("conv_in", "conv_out")  # they touch the data, not a hidden layer: Muon's authors leave such to AdamW


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, torch's own) for `matrices`, AdamW for `others`, with one learning rate.

    A convolution counts as its matrix (out, in * k * k). Updates are scaled to the size of AdamW's (Liu et al. 2025,
    section 2.2), so that learning rate and weight decay mean the same in both. The momentum is kept in the shape of
    its parameter, so that a checkpoint does not depend on the layout in memory.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
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


def make_optimizer(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the parameters of `module` that are trained."""
    require(bool(trainable(module)), f"nothing of {type(module).__name__} is trained", "model")
    return OPTIMIZERS[settings.optimizer](settings, module, device)


def _adamw(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return _adamw_of(settings, device, list(trainable(module).values()))


def _adamw_of(settings: Settings, device: torch.device, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    s, fused, group = settings, device.type in ("cpu", "cuda"), {"params": parameters}
    return torch.optim.AdamW([group], lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay, fused=fused)


def _adamw8bit(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Moments in 8 bits, in blocks (Dettmers et al. 2022); of tensors below 4096 numbers in 32."""
    import bitsandbytes

    s, parameters = settings, list(trainable(module).values())
    return bitsandbytes.optim.AdamW8bit(parameters, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay)


def _sgd(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    parameters = list(trainable(module).values())
    return torch.optim.SGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _muon(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    found = trainable(module)
    hidden = {f"{name}.weight" for name, layer in module.named_modules() if _is_hidden(name, layer)}
    hidden |= {f"{name}.{part}" for name in _lora_layers(module) for part in ("down", "up")}
    matrices = [p for name, p in found.items() if name in hidden]
    require(bool(matrices), "muon moves matrices, and none is trained: use adamw", "optimizer")
    others = [p for name, p in found.items() if name not in hidden]
    adamw = partial(_adamw_of, settings, device)
    return Muon(matrices, others, settings.learning_rate, settings.weight_decay, adamw)


def _is_hidden(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.Conv2d)) and name.rpartition(".")[2] not in ENDS


def _lora_layers(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


OPTIMIZERS: dict[str, Callable[[Settings, nn.Module, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
    "sgd": _sgd,
}


def checkpoint_bytes(state: TrainState) -> int:
    """What a checkpoint of `state` takes on disk once every parameter has been moved, to some KB."""
    own = state.module.state_dict()
    size = 2 * sum(own[name].nbytes for name in learned(state.module))  # and the average
    return size + sum(_moment_bytes(state.optimizer, p) for p in trainable(state.module).values())


def _moment_bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    if isinstance(optimizer, torch.optim.SGD):
        return 0
    if isinstance(optimizer, Muon):
        one = any(parameter is p for p in optimizer.param_groups[0]["params"])
        return parameter.nbytes if one else 2 * parameter.nbytes
    if isinstance(optimizer, torch.optim.AdamW) or parameter.numel() < 4096:
        return 2 * parameter.nbytes
    return 2 * parameter.numel() * 65 // 64 + 2048  # 8 bits, a scale for each block of 256, two tables
