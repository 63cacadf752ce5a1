"""What moves the weights: AdamW, also in 8 bits, SGD, or Muon for the matrices of hidden layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ldm.config import require
from ldm.nn.lora import LoraLayer
from ldm.training.checkpoints.state import trainable, trained_names
from ldm.training.loop.muon import Muon
from ldm.training.settings import Settings

ENDS = ("conv_in", "conv_out")  # they touch the data, not a hidden layer: Muon's authors leave such to AdamW


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
    parameters, hidden = trainable(module), _hidden_names(module)
    matrices = [p for name, p in parameters.items() if name in hidden]
    require(bool(matrices), "muon moves matrices, and none is trained: use adamw", "optimizer")
    others = [p for name, p in parameters.items() if name not in hidden]
    adamw = partial(_adamw_of, settings, device)
    return Muon(matrices, others, settings.learning_rate, settings.weight_decay, adamw)


def _hidden_names(module: nn.Module) -> set[str]:
    """The names of the matrices that Muon moves: weights of hidden layers, and the low-rank factors of updates."""
    names = set()
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.rpartition(".")[2] not in ENDS:
            names.add(f"{name}.weight")
        elif isinstance(layer, LoraLayer):
            names |= {f"{name}.down", f"{name}.up"}
    return names


OPTIMIZERS: dict[str, Callable[[Settings, nn.Module, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
    "sgd": _sgd,
}


def checkpoint_bytes(settings: Settings, module: nn.Module) -> int:
    """The size of a checkpoint on disk once every parameter has been moved, to some KB; no optimizer is built."""
    tensors, parameters = module.state_dict(), trainable(module)
    size = 2 * sum(tensors[name].nbytes for name in trained_names(module))  # the weights and their average
    moments = {"sgd": 0, "muon": 2, "adamw": 2, "adamw8bit": 2}[settings.optimizer]
    hidden = _hidden_names(module) if settings.optimizer == "muon" else set()
    for name, parameter in parameters.items():
        if settings.optimizer == "adamw8bit" and parameter.numel() >= 4096:
            size += 2 * parameter.numel() * 65 // 64 + 2048  # 8 bits, a scale for each block of 256, two tables
        else:
            size += (1 if name in hidden else moments) * parameter.nbytes
    return size
