"""A U-Net's forward as code that torch.compile makes of it, where drawing is told to.

Its sums are rounded otherwise than PyTorch's own, so that an image has other bits. A CPU's code is called with two rows
in every batch, so that these bits do not depend on the batch either. What is made is kept in a folder and found there
by other processes; it is made for one size, dtype and version of torch.

Shapes:  B rows   C, H, W latent channels, height, width   S tokens   D width of the text
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import console
from ldm.nn.attention import TextCache
from ldm.nn.batch_invariant import pad_to_even_batch
from ldm.nn.unet import TransformerBlock, UNet

KEPT = "TORCHINDUCTOR_CACHE_DIR"  # the variable that names torch's folder for compiled code
ROWS = 2  # of a call on a CPU
VARIANTS = 64  # sizes and kinds of calls of one process; torch would stop at 8


def code_folder() -> Path:
    """Where compiled code is kept: the folder that TORCHINDUCTOR_CACHE_DIR names, else ldm's in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.setdefault(KEPT, str(Path(os.path.expanduser(cache)) / "ldm" / "compiled")))


class GivenTexts(TextCache):
    """What a U-Net makes of its texts, given in the order in which it asks for it."""

    def __init__(self, items: Sequence[Any]):
        super().__init__()
        self._items, self._asked = items, 0

    def follow(self, states: Tensor) -> None:
        """They belong to the texts of the call."""

    def recall(self, module: nn.Module, make: Callable[[], Any]) -> Any:
        self._asked += 1
        return self._items[self._asked - 1]


class CompiledUNet:
    """Called as the U-Net is, without what a run keeps (`cache`, `deep`); the weights stay the U-Net's.

    What is made of the texts alone is made once for a tensor of them, as in TextCache, by PyTorch's own code.
    """

    def __init__(self, unet: UNet, backend: str = "inductor"):
        self.unet = unet
        self._texts: tuple[Tensor | None, ...] = (None, None)  # the texts, and their mask, that `_kept` is made of
        self._kept: list[Tensor] = []
        self._known: set[tuple[Any, ...]] = set()
        self._forward = self._code(backend)

    def _code(self, backend: str) -> Callable[..., Tensor]:
        """The U-Net on texts that are given, compiled when it is called."""
        self._folder = code_folder()
        cpu = next(self.unet.parameters()).is_cpu
        options = {"freezing": True} if cpu and backend == "inductor" else None  # weights as its convolutions want them
        how: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": backend, "options": options}
        return torch.compile(self._with_texts, **how)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        states: Tensor,
        *,
        time_ids: Tensor | None = None,
        perturb_in: Sequence[str] = (),
        **inputs: Tensor | None,
    ) -> Tensor:
        """x (B, C, H, W), timesteps (B,), states (B, S, D) and UNet.forward's other inputs -> (B, C_out, H, W)."""
        rows = len(x)
        given: dict[str, Any] = {"x": x, "timesteps": timesteps, "states": states, **inputs}
        given["time_ids"] = None if time_ids is None else time_ids.expand(rows, -1)
        self._announce(given, perturb_in)
        fixed: dict[str, Any] = {"perturb_in": tuple(perturb_in)} if perturb_in else {}
        mask = inputs.get("mask")
        if self._texts[0] is not states or self._texts[1] is not mask:
            self._texts, self._kept = (states, mask), self._made_of(states, mask)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=4 * VARIANTS):
            if not x.is_cpu:
                return self._forward(kept=self._kept, **given, **fixed)
            parts = []
            for first in range(0, rows, ROWS):
                kept = [_two(t[first : first + ROWS]) for t in self._kept]
                two = {name: None if t is None else _two(t[first : first + ROWS]) for name, t in given.items()}
                parts.append(self._forward(kept=kept, **two, **fixed))
        return torch.cat(parts)[:rows]

    def _with_texts(self, *inputs: Any, **more: Any) -> Tensor:
        return with_texts(self.unet, *inputs, **more)

    def _made_of(self, states: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The text's embedding where there is one, then keys and values (B, S, C) of each layer in their order."""
        even, mask = pad_to_even_batch(states, mask)
        text = self.unet.config.addition_embed_type == "text"
        kept = [self.unet.add_embedding(even, mask)] if text else []
        for block in self.unet.modules():
            if isinstance(block, TransformerBlock):
                kept += [block.attn2.to_k(even), block.attn2.to_v(even)]
        return [t[: len(states)] for t in kept]

    def _announce(self, given: Mapping[str, Any], perturb_in: Sequence[str]) -> None:
        """Say that code is made, once for each kind of call."""
        x = given["x"]
        shapes = ((name, None if t is None else (t.dtype, t.shape[1:])) for name, t in given.items())
        kind = (*shapes, *perturb_in, *(() if x.is_cpu else (len(x),)))
        if kind not in self._known:
            self._known.add(kind)
            height, width = x.shape[2:]
            console.say(f"compiling the network for latents of {width}x{height}: {self._takes()}")

    def _takes(self) -> str:
        return f"a minute or more, less where {self._folder} has the code already"


def with_texts(
    unet: UNet, x: Tensor, timesteps: Tensor, states: Tensor, kept: Sequence[Tensor], **inputs: Any
) -> Tensor:
    """UNet.forward with what it makes of the texts alone: its embedding where there is one, then keys and values."""
    alone = len(kept) % 2
    pairs = zip(kept[alone::2], kept[alone + 1 :: 2])
    return unet(x, timesteps, states, cache=GivenTexts([*kept[:alone], *pairs]), **inputs)


def _two(rows: Tensor) -> Tensor:
    """Two rows, the one twice where there is but one; copied, so that they begin at an aligned address in any batch."""
    return torch.cat([rows, rows]) if len(rows) < ROWS else rows.clone()
