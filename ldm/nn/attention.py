"""Multi-head attention as one function with several backends, and what a run of the U-Net keeps of its texts.

Backend "auto" is `sdpa`, but `chunked` where a CPU computes gradients in 16 bits: measured on two cores with AMX-BF16
(torch 2.13; 16 images, 192 channels, 8 heads, L = S = 256), forward and backward took 34 ms with `sdpa` and 12-18 ms
with `chunked` (L = S = 64: 11 against 1.4). In fp32, and forward alone, `sdpa` was faster, but for many tokens
in 16 bits: on a core of Zen 4 (2 images, 8 heads) 0.74 s with `sdpa` and 0.57 s by heads for L = S = 4096 of 320
channels, 73 and 60 ms for 1024 of 640; attention to 77 tokens of text took 23 and 50 ms.

Shapes:  B batch   L query tokens   S key tokens   C channels = heads * head size
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ldm.errors import ConfigError, ModelError, nearest
from ldm.nn.batch_invariant import Linear

BACKENDS: dict[str, Callable[..., Tensor]] = {}
MASKED = -10000.0  # added to the score of a masked token: finite, so that a row without any token stays finite
T = TypeVar("T")
FEW = 4  # queries; of fewer, the kernel of an AMD Zen 4 gives the images of each thread's share other bits
CHUNK_SCORES = 1 << 18  # scores of one head and image that `chunked` computes at a time
GROUP_SCORES = 1 << 22  # scores of all images and heads that it computes at a time, where gradients are wanted
MANY_SCORES = 1 << 20  # of one head and image, from which on "auto" is `chunked` in 16 bits on a CPU


def backend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lists `function(q, k, v, num_heads, bias)` in BACKENDS under its own name."""
    BACKENDS[function.__name__] = function
    return function


def check_backend(name: str, device: torch.device | None = None) -> str:
    """`name` again if it can be used here (on `device`). Raises ConfigError (unknown) or ModelError (not usable)."""
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"unknown attention {name!r:.80}", hint=nearest(str(name), ["auto", *BACKENDS]))
    if name == "xformers":
        _memory_efficient_attention()
        if device is not None and device.type != "cuda":
            raise ModelError(f"attention 'xformers' needs a GPU, not {device}", hint="use attention 'auto'")
    return name


def set_backend(network: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Make all layers of this kind in a network use this backend. Raises ConfigError or ModelError."""
    check_backend(name)
    for module in network.modules():
        if isinstance(module, kind):
            module.backend = name  # type: ignore[assignment]


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ / sqrt(C / heads)) v for each head.

    q (B, L, C); k, v (B, S, C); mask (B, S) bool, True where a token is attended to. Returns (B, L, C).
    """
    if backend == "auto":
        trains = q.requires_grad and torch.is_grad_enabled()
        slow = trains or (q.shape[1] * k.shape[1] >= MANY_SCORES and not is_compiling())  # else thousands of nodes
        backend = "chunked" if slow and q.device.type == "cpu" and q.dtype != torch.float32 else "sdpa"
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask.bool(), MASKED)  # (B, S)
    return BACKENDS[check_backend(backend)](q, k, v, num_heads, bias)


@backend
def sdpa(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """PyTorch's fused kernels."""
    length = q.shape[1]
    if length < FEW and q.is_cpu and not torch.is_grad_enabled():
        q = torch.cat([q, q[:, :1].expand(-1, FEW - length, -1)], dim=1)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, head size)
    bias = None if bias is None else bias[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)[:, :length]


@backend
def chunked(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """Written out over heads and chunks of queries, so that the scores at hand stay small; with gradients over groups
    of heads of all images."""
    q = q * (q.shape[-1] // num_heads) ** -0.5
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, head size)
    batch, _, length, _ = q.shape
    rows = min(length, max(1, CHUNK_SCORES // k.shape[2]))  # of no batch size: the bits depend on it
    if not torch.is_grad_enabled():
        return _by_head(q, k, v, bias, rows)
    group = max(1, GROUP_SCORES // (batch * rows * k.shape[2]))  # heads at a time: the bits do not
    heads = []
    for qh, kh, vh in zip(*(t.split(group, dim=1) for t in (q, k, v))):
        parts = [_softmax(part @ kh.transpose(2, 3), bias) @ vh for part in qh.split(rows, dim=2)]
        heads.append(torch.cat(parts, dim=2))  # (B, group, L, head size)
    return torch.cat(heads, dim=1).transpose(1, 2).flatten(2)


def _by_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """q (B, heads, L, head size), scaled, so many rows at a time: their scores stay in a core's cache -> (B, L, C)."""
    batch, heads, length, size = q.shape
    out = q.new_empty(batch, length, heads, size)
    for i, j in itertools.product(range(batch), range(heads)):
        keys, values = k[i, j].t().contiguous(), v[i, j].contiguous()  # (head size, S), (S, head size)
        for part, place in zip(q[i, j].split(rows), out[i, :, j].split(rows)):
            scores = part @ keys
            place.copy_((scores if bias is None else scores + bias[i]).softmax(-1) @ values)
    return out.flatten(2)


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:  # (B, group, rows, S), (B, S)
    return (scores if bias is None else scores + bias[:, None, None, :]).softmax(-1)


@backend
def xformers(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """xformers' memory-efficient kernels, for GPUs. Raises ModelError where they are absent or have none for this."""
    kernel = _memory_efficient_attention()
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))  # (B, tokens, heads, head size)
    if bias is not None:  # xformers wants the whole (B, heads, L, S), its last stride aligned to 8
        tokens = bias.shape[-1]
        bias = F.pad(bias, (0, -tokens % 8))[:, None, None, :].expand(-1, num_heads, q.shape[1], -1)
        bias = bias.contiguous()[..., :tokens]
    try:
        return kernel(q, k, v, attn_bias=bias).flatten(2)
    except (NotImplementedError, ValueError) as error:  # no kernel for this head size, dtype or card
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(f"attention 'xformers' cannot do this ({reason})", hint="use attention 'auto'") from None


def _memory_efficient_attention() -> Callable[..., Tensor]:
    """The kernel, or a ModelError that says what is missing."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise ModelError(
            "attention 'xformers' was asked for, but the package is not installed",
            hint="pip install xformers, or use attention 'auto'",
        ) from None
    if not torch.cuda.is_available():
        raise ModelError("attention 'xformers' needs a GPU, and there is none here", hint="use attention 'auto'")
    return memory_efficient_attention


class TextCache:
    """Keys and values of each cross-attention and the text's time embedding, for one batch of texts at a time.

    It belongs to one run, in which no weight changes. A step with other texts (prompt editing) empties it. The bits are
    the same, in 0.93 of the time with 32 rows, 0.96 with 2 (measured: the default model, fp32, one thread).
    """

    def __init__(self) -> None:
        self._states: Tensor | None = None
        self.made: dict[nn.Module, Any] = {}
        self.beside: Callable[[Any, Tensor, Tensor], Tensor] | None = None  # (layer, q, mixed): see ldm.nn.ip_adapter

    def follow(self, states: Tensor) -> None:
        """Forget all that was made of other texts than these (B, S, D); texts are told apart by identity."""
        if states is not self._states:
            self._states = states
            self.made.clear()

    def recall(self, module: nn.Module, make: Callable[[], T]) -> T:
        """What `make` returned for this module when it was first asked."""
        if module not in self.made:
            self.made[module] = make()
        return self.made[module]


def remember(cache: TextCache | None, module: nn.Module, make: Callable[[], T]) -> T:
    """What `make` returned for this module at a run's first step; without a cache it is made each time."""
    return make() if cache is None else cache.recall(module, make)


class AttentionPooling(nn.Module):
    """One query, the mean of all tokens that count plus a learned vector, attends to itself and to them."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.v_proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (B, S, D), (B, S) -> (B, D)
        if mask is None:
            query = x.mean(dim=1)
        else:
            query = (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            mask = F.pad(mask, (1, 0), value=True)  # (B, 1+S)
        query = query + self.positional_embedding.to(x.dtype)  # (B, D)
        x = torch.cat([query[:, None], x], dim=1)  # (B, 1+S, D)
        return attention(self.q_proj(query)[:, None], self.k_proj(x), self.v_proj(x), self.num_heads, mask)[:, 0]
