"""One optimizer step of any stage: weights, their average, the optimizer's moments."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.config import require
from ldm.device import half_dtype, missing_compiler, pick_device
from ldm.errors import ConfigError
from ldm.nn.lora import clone_shared_weights
from ldm.training.checkpoints.state import TrainState, trainable
from ldm.training.distributed import ALONE, Alone
from ldm.training.distributed.alone import Single, local, whole
from ldm.training.distributed.wrap import wrap_module
from ldm.training.loop.averages import averages_of, update_average
from ldm.training.loop.gradient_checkpointing import checkpoint_gradients
from ldm.training.loop.optimizers import learning_rate, make_optimizer
from ldm.training.loop.stage import Stage
from ldm.training.loop.trackers import check_trackers
from ldm.training.settings import Settings


def check_means(settings: Settings) -> None:
    """Raise ConfigError if this machine lacks fp16, a compiler, or the package of an optimizer or a tracker."""
    device = pick_device(settings.device)
    fits = settings.precision != "fp16" or device.type == "cuda"
    require(fits, f"fp16 is for CUDA, not for {device.type}: use bf16 or fp32", "precision")
    there = settings.optimizer != "adamw8bit" or importlib.util.find_spec("bitsandbytes") is not None
    require(there, "adamw8bit needs a package: pip install bitsandbytes, or use adamw", "optimizer")
    if getattr(settings, "compile", False) and (missing := missing_compiler(device)):
        raise ConfigError(f"needs {missing}", where="compile", hint="install it, or leave compile=false")
    if settings.report_to:
        check_trackers(settings)


def precision(settings: Settings, device: torch.device) -> AbstractContextManager:
    """Autocast to the settings' 16 bits, or none."""
    half = half_dtype(settings.precision, device)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)


def drawing_precision(settings: Settings, device: torch.device) -> AbstractContextManager:
    """The autocast of networks that draw or are scored: as `precision`, but none on a CPU, whose bits stay."""
    return nullcontext() if device.type == "cpu" else precision(settings, device)


def prepare(stage: Stage, settings: Settings, device: torch.device, group: Alone = ALONE) -> TrainState:
    """The start of a run: the stage's module on `device`, its average, an optimizer, and for fp16 a gradient scaler.

    Every process of a `group` has to call it.
    """
    module = stage.module.train()
    if not group.sharded:  # FSDP2 takes it there layer by layer: the whole of it need not fit
        module = module.to(device)
    if settings.gradient_checkpointing:
        checkpoint_gradients(module)
    scaler = torch.amp.GradScaler(device.type) if half_dtype(settings.precision, device) == torch.float16 else None
    kept = settings.ema or group.sharded  # without an average the weights themselves are drawn with
    ema = ema_copy(module) if kept else clone_shared_weights(module).eval().requires_grad_(False)
    if hasattr(stage, "follow"):
        stage.follow(ema)
    parallel = Single(group) if group.world == 1 else wrap_module(group, stage, ema, device)
    optimizer = make_optimizer(settings, module, device)
    averages = {decay: averages_of(ema, module) for decay in settings.ema_lengths}
    kept = getattr(stage, "tensors", {})
    return TrainState(module, ema, optimizer, scaler=scaler, parallel=parallel, averages=averages, stage=kept)


def ema_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode for the average. Trained parameters and buffers are copied, the rest is shared."""
    shared: dict[int, object] = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, shared).eval().requires_grad_(False)


class Outcome(NamedTuple):
    """The result of a step."""

    loss: float  # NaN where it is `bad`
    bad: bool  # loss or gradient was not finite; nothing was applied
    ids: tuple[str, ...]  # of its samples, where the batches know
    rows: int  # samples, of all processes together


def take_step(stage: Stage, state: TrainState, settings: Settings, batches: Iterator[Any]) -> Outcome:
    """One optimizer step, with gradients accumulated over `settings.accumulation` batches.

    If fp16's scaled gradients overflow, nothing is applied and the scale is halved: that is not `bad`.
    """
    device = next(state.module.parameters()).device
    rate, scaler, ids, parallel = learning_rate(settings, state.step), state.scaler, [], state.parallel
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    total, rows = torch.zeros((), device=device), 0
    for micro in range(settings.accumulation):
        with parallel.micro(last=micro == settings.accumulation - 1):
            with precision(settings, device):
                batch = parallel.group.agreed(partial(next, batches))
                ids += getattr(batch, "ids", ())
                rows += batch.part.size if hasattr(batch, "part") else settings.batch_size
                loss = parallel.loss(stage, batch, state.step, micro) / settings.accumulation
            (scaler.scale(loss) if scaler else loss).backward()
        total += loss.detach()
    total = parallel.group.total(total)
    if scaler:
        scaler.unscale_(state.optimizer)
    norm = clip_gradients(state.module, settings)
    mean, length = torch.stack([total, norm]).tolist()  # the one wait for a GPU in a step
    applied = math.isfinite(mean) and math.isfinite(length)
    bad = not applied
    if applied:
        state.optimizer.step()
        warm = (1 + state.step) / (10 + state.step)
        update_ema(state.ema, state.module, min(settings.ema, warm))
        for decay, average in state.averages.items():
            update_average(average, state.module, min(decay, warm))
    elif scaler:
        bad = not math.isfinite(mean) or scaler.get_scale() <= 1
    if scaler:
        scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return Outcome(math.nan if bad else mean, bad, tuple(ids), rows)


def clip_gradients(module: nn.Module, settings: Settings) -> Tensor:
    """Clip the gradients' norm to `settings.clip`, and return what it was.

    A text encoder with a rate of its own is clipped by itself, so that a spike of one leaves the other's step alone.
    """
    apart = getattr(settings, "text_rate", 0) and isinstance(module, nn.ModuleDict)
    parts = module.values() if apart else [module]
    norms = [whole(nn.utils.clip_grad_norm_(trainable(part).values(), settings.clip)) for part in parts]
    return torch.stack(norms).norm() if apart else norms[0]


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, decay: float) -> None:
    """ema ← decay · ema + (1 − decay) · module of what is trained, in place; buffers are copied."""
    pairs = [(old, new) for old, new in zip(ema.parameters(), module.parameters()) if new.requires_grad]
    if pairs:
        torch._foreach_lerp_(local(old for old, _ in pairs), local(new for _, new in pairs), 1 - decay)
    for old, new in zip(ema.buffers(), module.buffers()):
        old.copy_(new)
