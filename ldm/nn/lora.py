"""Low-rank updates of linear layers and convolutions: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024).

    LoRA  W' = W + f a/r B A                        f factor, a alpha, r rank
    DoRA  W' = W + f (m V / |V| - W)                V = W + a/r B A: one norm and one m for each output

To render, the updates are merged into a copy that shares all other weights: a layer then is what it was, so an image
keeps its bits. To train, a LoraLayer stands in the place of each layer.

Shapes:  W (out, in) or (out, in, k, k)   A (r, in) or (r, in, k, k)   B (out, r) or (out, r, 1, 1)   m (out,)
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError, ModelError, nearest

Layer = nn.Linear | nn.Conv2d
Module = TypeVar("Module", bound=nn.Module)
ATTENTION = re.compile(
    r"(^|\.)(to_q|to_k|to_v|to_out\.0"  # of U-Nets and flow transformers
    r"|add_q_proj|add_k_proj|add_v_proj|to_add_out"  # of the text in flow transformers
    r"|self_attn\.(q|k|v|out)_proj)$"  # of CLIP
)
TRANSFORMER = re.compile(r"(^|\.)(attentions|layers|transformer_blocks|single_transformer_blocks)\.")
TARGETS = {  # words for many layers at once: (layer's name, dimensions of its weight) -> whether it is meant
    "attention": lambda name, dimensions: bool(ATTENTION.search(name)),
    "transformer": lambda name, dimensions: bool(TRANSFORMER.search(name)),
    "all-linear": lambda name, dimensions: dimensions == 2,
    "all": lambda name, dimensions: True,
}


@dataclass(frozen=True)
class LowRank:
    """What one adapter does to one layer."""

    down: Tensor  # A
    up: Tensor  # B
    alpha: float
    magnitude: Tensor | None = None  # m; None: LoRA

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self, weight: Tensor, factor: float = 1.0) -> Tensor:
        """s B A in the shape of `weight`, in fp32 on its device."""
        up, down = (t.to(weight.device, torch.float32).flatten(1) for t in (self.up, self.down))
        return (factor * self.alpha / self.rank) * (up @ down).view(weight.shape)


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """Every layer that can have an update, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}


def merged(weight: Tensor, updates: Iterable[tuple[LowRank, float]], dora: str = "linear") -> Tensor:
    """`weight` with every (update, factor), computed in fp32, in its own dtype; the changes are added up.

    A factor scales the whole change, as in A1111 and ComfyUI. With dora="peft" that of a DoRA scales B A inside the
    norm, as PEFT's adapter weights do: not linear, and nearly the whole change at a factor just above 0.
    """
    base = weight.float()
    total = base
    for update, factor in updates:
        if factor == 0:
            continue
        if update.magnitude is None:
            total = total + update.delta(base, factor)
            continue
        whole = base + update.delta(base, factor if dora == "peft" else 1.0)
        change = _per_output(_dora_scale(update.magnitude.to(base), whole), whole) * whole - base
        total = total + (change if dora == "peft" else factor * change)
    return total.to(weight.dtype)


def _dora_scale(magnitude: Tensor, whole: Tensor) -> Tensor:
    """m / |W + s B A| (out,); the norm is a constant to the gradient (Liu et al. 2024, section 4.3)."""
    norm = whole.detach().flatten(1).norm(dim=1).clamp_min(torch.finfo(whole.dtype).tiny)
    return magnitude / norm


def _per_output(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))  # (out,) -> (out, 1, …)


def clone_shared_weights(module: Module) -> Module:
    """The same module again, on the same memory: giving the copy other weights, or moving it, leaves the first alone.

    Writing into its weights would change both.
    """
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def merge(
    module: nn.Module, updates: Mapping[str, Sequence[tuple[LowRank, float]]], dora: str = "linear"
) -> dict[str, nn.Parameter]:
    """Give the named layers of `module` merged weights in place; returns the weights that they had, for `unmerge`."""
    kept = {}
    with torch.no_grad():
        for name, found in updates.items():
            kept[name] = weight = module.get_parameter(f"{name}.weight")
            module.get_submodule(name).weight = nn.Parameter(merged(weight, found, dora), requires_grad=False)
    return kept


def unmerge(module: nn.Module, kept: Mapping[str, nn.Parameter]) -> None:
    """Give the layers back what `merge` returned: the same bits, without arithmetic."""
    for name, weight in kept.items():
        module.get_submodule(name).weight = weight


class LoraLayer(nn.Module):
    """A frozen linear layer or convolution with an update that is trained, in fp32.

    In eval mode it computes with the merged weight, as rendering will, so that an image keeps its bits.
    With `bypass` it is the layer that it stands for (see `without_updates`).
    """

    def __init__(self, layer: Layer, update: LowRank):
        super().__init__()
        self.layer, self.bypass = layer.requires_grad_(False), False
        device = layer.weight.device
        self.down = nn.Parameter(update.down.detach().to(device, torch.float32, copy=True))
        self.up = nn.Parameter(update.up.detach().to(device, torch.float32, copy=True))
        self.magnitude = None
        if update.magnitude is not None:
            self.magnitude = nn.Parameter(update.magnitude.detach().to(device, torch.float32, copy=True))
        self.alpha = update.alpha

    def update(self) -> LowRank:
        """The update as it is now, on the parameters' own memory."""
        return LowRank(self.down, self.up, self.alpha, self.magnitude)

    def forward(self, x: Tensor) -> Tensor:  # (B, …, in) -> (B, …, out), or (B, in, H, W) -> (B, out, H', W')
        if self.bypass:
            return self.layer(x)
        if not self.training:
            weight = merged(self.layer.weight, [(self.update(), 1.0)])
            return torch.func.functional_call(self.layer, {"weight": weight}, (x,))
        base, low = self.layer(x), self._low_rank(x)
        if self.magnitude is None:
            return base + low
        whole = self.layer.weight.float() + self.update().delta(self.layer.weight)
        scale, bias = _dora_scale(self.magnitude, whole), self.layer.bias
        if x.ndim == 4 and isinstance(self.layer, nn.Conv2d):
            scale = scale.view(1, -1, 1, 1)
            bias = None if bias is None else bias.view(1, -1, 1, 1)
        unbiased = base if bias is None else base - bias
        # in fp32 by `scale`, rounded once: in bf16 neither 1.0015 nor a sum with 0.0015 of itself is told from 1
        return (base + (scale - 1) * unbiased + scale * low).to(base.dtype)

    def _low_rank(self, x: Tensor) -> Tensor:
        """s B A x."""
        scale = self.alpha / len(self.down)
        down, up = self.down.to(x.dtype), (self.up if scale == 1 else self.up * scale).to(x.dtype)
        if isinstance(self.layer, nn.Linear):
            return F.linear(F.linear(x, down), up)
        return F.conv2d(F.conv2d(x, down, stride=self.layer.stride, padding=self.layer.padding), up)


def meant(shapes: Mapping[str, Sequence[int]], targets: Sequence[str]) -> list[str]:
    """The layers (name -> shape of its weight) that any of `targets` means: a word of TARGETS, a name, or its end.

    "to_q" takes every to_q, "attn2.to_q" those of cross attention. Raises ConfigError for one that means no layer.
    """
    found: set[str] = set()
    for target in targets:
        ends = (name for name in shapes if name == target or name.endswith(f".{target}"))
        names = [n for n, shape in shapes.items() if TARGETS[target](n, len(shape))] if target in TARGETS else [*ends]
        if not names:
            known = [*TARGETS, *dict.fromkeys(re.findall(r"[^.]+(?:\.\d+)?$", name)[0] for name in shapes)]
            raise ConfigError(f"there is no layer named {target!r:.80}", where="targets", hint=nearest(target, known))
        found.update(names)
    return [name for name in shapes if name in found]


def new_updates(
    module: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dora: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, LowRank]:
    """An update that changes nothing yet (A random, B zero) for each layer that `targets` mean (see `meant`).

    Raises ConfigError for one that means no layer.
    """
    found = layers_of(module)
    chosen = meant({name: layer.weight.shape for name, layer in found.items()}, targets)
    return {name: _new(found[name], rank, alpha, dora, generator) for name in chosen}


def _new(layer: Layer, rank: int, alpha: float, dora: bool, generator: torch.Generator | None) -> LowRank:
    """A uniform within 1/sqrt(fan_in), as PEFT starts it, B zero, m the rows' own norms."""
    weight = layer.weight.detach().float()
    out, *fan = weight.shape
    bound = 1 / math.sqrt(math.prod(fan))
    down = (torch.rand((rank, *fan), generator=generator) * 2 - 1) * bound
    up = torch.zeros(out, rank, *[1] * (len(fan) - 1))
    return LowRank(down, up, alpha, weight.flatten(1).norm(dim=1) if dora else None)


def attach(module: nn.Module, updates: Mapping[str, LowRank]) -> None:
    """Put a LoraLayer in the place of each named layer, and freeze all else. Changes `module`: never a shared one.

    Raises ModelError for a name that is no layer of it.
    """
    found = layers_of(module)
    if missing := [name for name in updates if name not in found]:
        raise ModelError(f"{type(module).__name__} has no layer {missing[0]}")
    module.requires_grad_(False)
    for name, update in updates.items():
        module.set_submodule(name, LoraLayer(found[name], update).train(module.training))


@contextmanager
def without_updates(module: nn.Module) -> Iterator[None]:
    """Inside, `module` computes as it did before `attach`."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    try:
        for layer in layers:
            layer.bypass = True
        yield
    finally:
        for layer in layers:
            layer.bypass = False


def folded(module: Module) -> Module:
    """A copy in eval mode in which each LoraLayer is the plain layer that it amounts to; all other memory is shared."""
    copied = clone_shared_weights(module).eval()
    for name, found in [(n, layer) for n, layer in copied.named_modules() if isinstance(layer, LoraLayer)]:
        weight = merged(found.layer.weight, [(found.update(), 1.0)])
        found.layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        copied.set_submodule(name, found.layer)
    return copied


def frozen_copy(module: Module) -> Module:
    """The module as it is now, in eval mode, without gradients; what will not be trained is shared."""
    updated = any(isinstance(layer, LoraLayer) for layer in module.modules())
    return (folded(module) if updated else copy.deepcopy(module).eval()).requires_grad_(False)


def updates_of(module: nn.Module) -> dict[str, LowRank]:
    """Copies of the updates of every LoraLayer in `module`, by the name of the layer it stands for."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    return {name: copy.deepcopy(_detached(layer.update())) for name, layer in layers.items()}


def _detached(update: LowRank) -> LowRank:
    magnitude = None if update.magnitude is None else update.magnitude.detach()
    return LowRank(update.down.detach(), update.up.detach(), update.alpha, magnitude)
