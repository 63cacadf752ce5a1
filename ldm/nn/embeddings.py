"""What the U-Net is told of time, sizes and texts as a whole: sinusoids, their MLP, and pooled text.

Shapes:  B batch   S text tokens   D text width   E time embedding
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import attention
from ldm.nn.batch_invariant import Linear, silu


def sinusoidal(values: Tensor, channels: int) -> Tensor:
    """values (N,) -> (N, channels): cosines, then sines, of frequencies from 1 down to 1/10000, in fp32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, embed: int):
        super().__init__()
        self.linear_1 = Linear(channels, embed)
        self.linear_2 = Linear(embed, embed)

    def forward(self, x: Tensor) -> Tensor:  # (B, channels) -> (B, E)
        return self.linear_2(silu(self.linear_1(x), self.training))


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


class TextTimeEmbedding(nn.Module):
    """Text pooled into the time embedding (addition_embed_type "text")."""

    def __init__(self, width: int, embed: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.pool = AttentionPooling(width, num_heads)
        self.proj = Linear(width, embed)
        self.norm2 = nn.LayerNorm(embed)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:  # (B, S, D), (B, S) -> (B, E)
        return self.norm2(self.proj(self.pool(self.norm1(states), mask)))
