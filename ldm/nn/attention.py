"""Multi-head attention as one function with several backends.

Shapes:  B batch   L query tokens   S key tokens   C channels = heads * head size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import ConfigError, ModelError, nearest

BACKENDS: dict[str, Callable[..., Tensor]] = {}
MASKED = -10000.0  # added to the score of a masked token: finite, so that a row without any token stays finite
CHUNK_SCORES = 1 << 18  # scores held at a time by `chunked`: 1 MB in fp32, within a core's level-2 cache


def backend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lists `function(q, k, v, num_heads, bias)` in BACKENDS under its own name."""
    BACKENDS[function.__name__] = function
    return function


def check_backend(name: str) -> str:
    """`name` again if it can be used here. Raises ConfigError (unknown) or ModelError (not installed)."""
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"unknown attention '{name}'", todo=nearest(name, ["auto", *BACKENDS]))
    if name == "xformers":
        _memory_efficient_attention()
    return name


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ / sqrt(C / heads)) v for each head.

    q (B, L, C); k, v (B, S, C); mask (B, S) bool, True where a token is attended to. Returns (B, L, C).
    backend "auto" takes `sdpa` on a GPU and `chunked` on a CPU (see there).
    """
    if backend == "auto":
        backend = "chunked" if q.device.type == "cpu" else "sdpa"
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask.bool(), MASKED)  # (B, S)
    return BACKENDS[check_backend(backend)](q, k, v, num_heads, bias)


@backend
def sdpa(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """PyTorch's fused kernels."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, head size)
    bias = None if bias is None else bias[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


@backend
def chunked(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """Written out head by head over chunks of queries, so that the scores stay in cache: faster than `sdpa` on CPUs."""
    length, tokens = q.shape[1], k.shape[1]
    rows = max(1, CHUNK_SCORES // tokens)  # depends on no batch size: neither may the bits
    q = q * (q.shape[-1] // num_heads) ** -0.5
    heads = []
    for qh, kh, vh in zip(*(t.chunk(num_heads, dim=-1) for t in (q, k, v))):  # (B, tokens, head size)
        out = []
        for start in range(0, length, rows):
            scores = qh[:, start : start + rows] @ kh.transpose(1, 2)  # (B, rows, S)
            if bias is not None:
                scores = scores + bias[:, None, :]
            out.append(scores.softmax(-1) @ vh)
        heads.append(out[0] if len(out) == 1 else torch.cat(out, dim=1))
    return torch.cat(heads, dim=-1)


@backend
def xformers(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """xformers' memory-efficient kernels, for GPUs. Raises ModelError where they are absent."""
    kernel = _memory_efficient_attention()
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))  # (B, tokens, heads, head size)
    if bias is not None:  # xformers wants the whole (B, heads, L, S), its last stride aligned to 8
        tokens = bias.shape[-1]
        bias = F.pad(bias, (0, -tokens % 8))[:, None, None, :].expand(-1, num_heads, q.shape[1], -1)
        bias = bias.contiguous()[..., :tokens]
    return kernel(q, k, v, attn_bias=bias).flatten(2)


def _memory_efficient_attention() -> Callable[..., Tensor]:
    """The kernel, or a ModelError that says what is missing."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise ModelError(
            "attention 'xformers' was asked for, but the package is not installed",
            todo="pip install xformers, or use attention 'auto'",
        ) from None
    if not torch.cuda.is_available():
        raise ModelError("attention 'xformers' needs a GPU, and there is none here", todo="use attention 'auto'")
    return memory_efficient_attention
