"""Whether code that torch.compile made trains a network as the network itself would."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ldm.errors import NumericsError
from ldm.training.checkpoints.state import trainable
from ldm.training.distributed.alone import Single, is_sharded, whole
from ldm.training.loop.stage import Stage
from ldm.training.loop.step import precision
from ldm.training.settings import Settings

NEAR = 2.0  # times: 16 bits alone change the gradient of a weight by less
SMALL = 1e-3  # of the whole gradient's length, below which a weight's gradient may be nothing but rounding


def check_compiled(stage: Stage, settings: Settings, batch: Any, step: int, parallel: Single) -> None:
    """Compare the gradients of a step by compiled code with those of the plain networks; nothing is changed by it.

    A compiler may be wrong without a word: torch 2.13 made code for bf16 on CPUs that trained the last level of a U-Net
    alone. Processes of `parallel` call it together. Raises NumericsError that names the weight which is furthest off.
    """
    compiled = {name: value for name, value in vars(stage).items() if hasattr(value, "_orig_mod")}
    if not compiled:
        return
    kept = {name: value.clone() for name, value in getattr(stage, "tensors", {}).items()}
    found = _lengths(stage, settings, batch, step, parallel)
    try:
        for name, value in compiled.items():
            setattr(stage, name, value._orig_mod)
        right = _lengths(stage, settings, batch, step, parallel)
    finally:
        for name, value in compiled.items():
            setattr(stage, name, value)
    for name, value in kept.items():
        stage.tensors[name].copy_(value)
    least = SMALL * sum(length**2 for length in right.values()) ** 0.5 or 1.0
    if not math.isfinite(least):  # a bad step, which the run itself tells
        return
    off = {name: max(one, least) / max(right[name], least) for name, one in found.items()}
    worst = max(off, key=lambda name: max(off[name], 1 / off[name]), default=None)
    if worst is not None and not 1 / NEAR < off[worst] < NEAR:
        what = f"the compiled network learns wrongly: its gradient of {worst} has length {found[worst]:.2g}"
        hint = f"use compile=false, or another version of torch than {torch.__version__}"
        raise NumericsError(f"{what}, the plain one's {right[worst]:.2g}", where="compile", hint=hint)


def _lengths(stage: Stage, settings: Settings, batch: Any, step: int, parallel: Single) -> dict[str, float]:
    """The gradient length of each trained weight: of this process's rows, of all rows where weights are sharded."""
    module: nn.Module = stage.module
    device = next(module.parameters()).device
    with parallel.micro(last=is_sharded(module)):
        with precision(settings, device):
            loss = parallel.loss(stage, batch, step, 0)
        loss.backward()
    trained = trainable(module)
    nothing = torch.zeros((), device=device)
    lengths = [nothing if p.grad is None else whole(p.grad.float().norm()) for p in trained.values()]
    module.zero_grad(set_to_none=True)
    return dict(zip(trained, torch.stack(lengths).tolist()))
