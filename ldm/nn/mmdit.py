"""The transformers of SD3, SD3.5 (Esser et al. 2024) and FLUX.1 (Black Forest Labs 2024).

Text and image attend to each other as one sequence, at first each with weights of its own.

Module names follow diffusers' SD3Transformer2DModel and FluxTransformer2DModel: a checkpoint loads with strict=True and
no key map. Latents go in and come out as (B, C, H, W); they are cut into patches, or "packed", inside.
Shapes:  B batch   C channels   H, W latent height, width   p patch size   L = H*W/p²   S text tokens   D text width
         E width of the network   T = S + L, the text first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ModelError
from ldm.nn.attention import attention, set_backend
from ldm.nn.batch_invariant import Linear, pad_to_even_batch, per_image, silu
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.positions import Rope, rope_of, rotated, sincos_positions
from ldm.nn.unet import TimestepEmbedding, sinusoidal
from ldm.nn.weights import load_weights, on_meta

__all__ = ["MMDiT", "MMDiTConfig", "load_mmdit"]

WAVES = 256  # of a timestep
LARGEST = 65504.0  # in fp16


class AdaNorm(nn.Module):
    """So many vectors of the network's width from the time embedding (adaLN, Peebles & Xie 2023)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.linear = Linear(width, count * width)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:  # (B, E) after its silu -> count times (B, 1, E)
        return self.linear(temb)[:, None].chunk(self.count, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def finite(x: Tensor) -> Tensor:
    """In fp16, what overflowed becomes the largest number: some tokens of the text do in FLUX."""
    return x.clamp(-LARGEST, LARGEST) if x.dtype == torch.float16 else x


def gelu(x: Tensor, training: bool) -> Tensor:
    return per_image(partial(F.gelu, approximate="tanh"), x, training)


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x), self.training)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gate * self.net(modulated(x, shift, scale))


class HeadNorm(nn.RMSNorm):
    """In the dtype of its weight, also where autocast hands it 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Of one sequence, or of image and text, each with its own projections, as one sequence.

    text: there are projections of the text; text_out: and one of what it becomes; out: one of what the image becomes.
    """

    backend = "auto"

    def __init__(self, config: MMDiTConfig, text: bool = False, text_out: bool = False, out: bool = True):
        super().__init__()
        width, self.num_heads = config.width, config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = self._head_norms(config)
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(width, width) for _ in range(3))
            self.norm_added_q, self.norm_added_k = self._head_norms(config)
        self.to_out = nn.ModuleList([Linear(width, width) if out else nn.Identity()])
        self.to_add_out = Linear(width, width) if text_out else nn.Identity()

    @staticmethod
    def _head_norms(config: MMDiTConfig) -> tuple[nn.Module, nn.Module]:
        make = partial(HeadNorm, config.attention_head_dim, eps=1e-6) if config.qk_norm else nn.Identity
        return make(), make()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, L, E) -> (B, L, heads, head size)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:
        """q, k (B, T, heads, head size), v (B, T, E) -> (B, T, E)."""
        if rope is not None:
            q, k = rotated(q, rope), rotated(k, rope)
        return attention(q.flatten(2), k.flatten(2), v, self.num_heads, mask, self.backend)

    def forward(self, x: Tensor, rope: Rope | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, T, E) attends to itself -> (B, T, E)."""
        q, k = self.norm_q(self._heads(self.to_q(x))), self.norm_k(self._heads(self.to_k(x)))
        return self.to_out[0](self._attend(q, k, self.to_v(x), rope, mask))

    def joint(self, x: Tensor, text: Tensor, rope: Rope | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, L, E) and text (B, S, E) attend to both -> the same shapes; mask (B, T) bool."""
        q, k = self.norm_q(self._heads(self.to_q(x))), self.norm_k(self._heads(self.to_k(x)))
        text_q = self.norm_added_q(self._heads(self.add_q_proj(text)))
        text_k = self.norm_added_k(self._heads(self.add_k_proj(text)))
        q, k = torch.cat([text_q, q], dim=1), torch.cat([text_k, k], dim=1)
        v = torch.cat([self.add_v_proj(text), self.to_v(x)], dim=1)
        parts = self._attend(q, k, v, rope, mask).split([text.shape[1], x.shape[1]], dim=1)
        text, x = (part.contiguous() for part in parts)  # else products in bf16 may sum in another order
        return self.to_out[0](x), self.to_add_out(text)


class JointBlock(nn.Module):
    """Image and text attend to both, then each has its own feed-forward layer.

    last: the last block of SD3, after which the text is not needed. dual: the image attends to itself once more.
    """

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        width, self.last = config.width, last
        self.norm1 = AdaNorm(width, 9 if dual else 6)
        self.norm1_context = AdaNorm(width, 2 if last else 6)
        self.attn = Attention(config, text=True, text_out=not last)
        self.attn2 = Attention(config) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(
        self, x: Tensor, text: Tensor, temb: Tensor, rope: Rope | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, E), text (B, S, E), temb (B, E) after its silu -> x, text; the last leaves the text as it is."""
        shift, scale, gate, *rest = self.norm1(temb)  # rest: of the feed-forward layer, then of the second attention
        of_text = self.norm1_context(temb)
        text_shift, text_scale = of_text[:2] if not self.last else of_text[::-1]
        h, text_h = self.attn.joint(modulated(x, shift, scale), modulated(text, text_shift, text_scale), rope, mask)
        h = x + gate * h
        if self.attn2 is not None:
            shift, scale, gate = rest[3:]
            h = h + gate * self.attn2(modulated(x, shift, scale))
        x = self.ff(h, *rest[:3])
        if self.ff_context is None:
            return x, text
        return x, finite(self.ff_context(text + of_text[2] * text_h, *of_text[3:]))


class SingleBlock(nn.Module):
    """Attention and feed-forward layer side by side, of text and image as one sequence."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.width
        self.norm = AdaNorm(width, 3)
        self.proj_mlp = Linear(width, 4 * width)
        self.proj_out = Linear(5 * width, width)
        self.attn = Attention(config, out=False)

    def forward(self, x: Tensor, temb: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:  # (B, T, E)
        shift, scale, gate = self.norm(temb)
        h = modulated(x, shift, scale)
        h = torch.cat([self.attn(h, rope, mask), gelu(self.proj_mlp(h), self.training)], dim=-1)
        return finite(x + gate * self.proj_out(h))


class PatchEmbedding(nn.Module):
    """SD3's: patches through one layer, and the middle of a square of learned positions."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        patch, self.size = config.patch_size, config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)
        positions = sincos_positions(config.width, self.size, config.sample_size // patch)
        self.register_buffer("pos_embed", positions)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, L, E)
        x = self.proj(x)
        rows, columns = x.shape[-2:]
        if max(rows, columns) > self.size:
            what = f"{rows}x{columns} patches are more than the {self.size}x{self.size} that this transformer has"
            raise ModelError(what, hint="draw a smaller image")
        top, left = (self.size - rows) // 2, (self.size - columns) // 2
        square = self.get_buffer("pos_embed").unflatten(1, (self.size, self.size))
        positions = square[:, top : top + rows, left : left + columns].flatten(1, 2)
        return (x.flatten(2).transpose(1, 2) + positions).to(x.dtype).contiguous()


def packed(x: Tensor, patch: int) -> Tensor:
    """FLUX's patches: (B, C, H, W) -> (B, L, C p p)."""
    rows, columns = (size // patch for size in x.shape[-2:])
    x = x.unflatten(-1, (columns, patch)).unflatten(2, (rows, patch))  # (B, C, rows, p, columns, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class TextTimeEmbedding(nn.Module):
    """Timestep, pooled text and, where it is an input, the guidance's scale."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(WAVES, config.width)
        if config.guidance_embeds:
            self.guidance_embedder = TimestepEmbedding(WAVES, config.width)
        self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, config.width)

    def forward(self, timesteps: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:  # (B,), (B,), (B, P)
        waves = partial(per_image, partial(sinusoidal, channels=WAVES), training=self.training)
        temb = self.timestep_embedder(waves(timesteps).to(pooled.dtype))
        if guidance is not None:
            temb = temb + self.guidance_embedder(waves(1000 * guidance.float()).to(pooled.dtype))
        return temb + self.text_embedder(pooled)  # (B, E)


class MMDiT(nn.Module):
    """Predicts the velocity, noise - x0, from noisy latents, timesteps and text.

    `gradient_checkpointing` computes each block's activations again in the backward pass instead of keeping them.
    In eval mode an image's bits do not depend on the batch it is in (see Linear and `forward`).
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.lend: Callable | None = None  # gives each block for its work, as a context (see nn/offload.py)
        width, patch, last = config.width, config.patch_size, config.num_layers - 1
        if config.is_flux:
            self.x_embedder = Linear(config.in_channels * patch**2, width)
        else:
            self.pos_embed = PatchEmbedding(config)
        self.time_text_embed = TextTimeEmbedding(config)
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config, dual=i in config.dual_attention_layers, last=i == last and not config.is_flux)
            for i in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = AdaNorm(width, 2)
        self.proj_out = Linear(width, patch**2 * config.out_channels)

    def set_attention(self, name: str) -> None:
        """Takes this backend ("auto" or a name of BACKENDS) from now on. Raises ConfigError or ModelError."""
        set_backend(self, Attention, name)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        states: Tensor,
        *,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """x (B, C_in, H, W), timesteps (B,) = 1000 t, states (B, S, D), mask (B, S) bool, pooled (B, P), guidance (B,),
        the scale itself (3.5 is usual) -> (B, C_out, H, W), all but timesteps and guidance in x's dtype.
        Raises ModelError for sizes that are no multiple of the patch size or too large, and for a missing `pooled`
        or a `guidance` that is missing or not an input of this transformer.
        """
        images, patch = len(x), self.config.patch_size
        rows, columns = (size // patch for size in x.shape[-2:])
        text = self._check_inputs(x, pooled, guidance)
        if not self.training:
            x, timesteps, states, mask, text, guidance = pad_to_even_batch(x, timesteps, states, mask, text, guidance)
        temb = silu(self.time_text_embed(timesteps, guidance, text), self.training)  # (B, E)
        h = self.x_embedder(packed(x, patch)) if self.config.is_flux else self.pos_embed(x)
        text = self.context_embedder(states)  # (B, S, E)
        tokens, axes = text.shape[1], self.config.axes_dims_rope
        rope = rope_of(axes, tokens, rows, columns, x.device) if axes else None
        if mask is not None:
            mask = F.pad(mask, (0, h.shape[1]), value=True)  # (B, T)

        for block in self.transformer_blocks:
            h, text = self._run(block, h, text, temb, rope, mask)
        if len(self.single_transformer_blocks):
            h = torch.cat([text, h], dim=1)
            for block in self.single_transformer_blocks:
                h = self._run(block, h, temb, rope, mask)
            h = h[:, tokens:]

        scale, shift = self.norm_out(temb)
        return self._unpacked(self.proj_out(modulated(h, shift, scale)), rows, columns)[:images]

    def _check_inputs(self, x: Tensor, pooled: Tensor | None, guidance: Tensor | None) -> Tensor:
        """The pooled text, if all inputs are there and the latents can be cut into patches."""
        height, width = x.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            what = f"latents of {height}x{width} cannot be cut into patches of {patch}x{patch}"
            raise ModelError(what, hint=f"height and width of latents have to be multiples of {patch}")
        if pooled is None:
            raise ModelError("this transformer needs pooled text")
        if (guidance is not None) != self.config.guidance_embeds:
            what = "needs the scale of the guidance" if guidance is None else "does not know a scale of the guidance"
            raise ModelError(f"this transformer {what} (guidance_embeds {self.config.guidance_embeds})")
        return pooled

    def _unpacked(self, h: Tensor, rows: int, columns: int) -> Tensor:
        """(B, L, p p C_out), or in FLUX C_out p p -> (B, C_out, H, W)."""
        patch, channels = self.config.patch_size, self.config.out_channels
        h = h.unflatten(1, (rows, columns))
        if self.config.is_flux:
            h = h.unflatten(-1, (channels, patch, patch)).permute(0, 3, 1, 4, 2, 5)
        else:
            h = h.unflatten(-1, (patch, patch, channels)).permute(0, 5, 1, 3, 2, 4)
        return h.flatten(4).flatten(2, 3)  # of (B, C_out, rows, p, columns, p)

    def _run(self, block: Callable, *args):
        if self.lend is not None:
            with self.lend(block) as lent:
                return lent(*args)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def load_mmdit(config: MMDiTConfig, state: Mapping[str, Tensor], where: object = None) -> MMDiT:
    """A transformer in eval mode that holds the tensors of `state` themselves. Raises ModelError where they differ."""
    return load_weights(on_meta(lambda: MMDiT(config)), state, where)
