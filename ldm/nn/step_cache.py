"""Deep features of a U-Net that are reused by the next steps (DeepCache, Ma et al. 2024): faster, and inexact.

From one step to the next the deep levels change little. What enters the last level on the way up is kept, and the calls
that follow compute only the highest resolution: the first level down and the last one up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class StepCache:
    """The deep features of one run, computed anew in every n-th call, and where texts or the number of rows change."""

    def __init__(self, every: int):
        self.every = every
        self._kept: Tensor | None = None  # (B, C, H, W)
        self._states: Tensor | None = None
        self._age = 0  # calls since it was made

    def but_last_level(
        self,
        unet: Any,
        states: Tensor,
        x: Tensor,
        temb: Tensor,
        context: Mapping[str, tuple],
        residuals: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """A U-Net from `conv_in`'s output x to what enters its last level: (that, what is handed across to it).

        The deep levels are computed or recalled; the rest is as in UNet.forward.
        """
        kept = self.recall(states, len(x))
        if kept is None:
            x, skips = unet.down(x, temb, context)
            x = x + residuals[-1] if residuals else x
        else:
            skips = _first_level(unet, x, temb, context)
        skips = [skip + more for skip, more in zip(skips, residuals)] if residuals else skips
        if kept is not None:
            return kept, skips
        for level in range(len(unet.up_blocks) - 1):
            x = unet.up(level, x, skips, temb, context)
        self._kept = x
        return x, skips

    def recall(self, states: Tensor, rows: int) -> Tensor | None:
        """What is kept, for a call with these text states and so many rows; None where it has to be made."""
        fits = self._kept is not None and self._states is states and len(self._kept) == rows
        if fits and self._age < self.every - 1:
            self._age += 1
            return self._kept
        self._states, self._age = states, 0
        return None


def _first_level(unet: Any, x: Tensor, temb: Tensor, context: Mapping[str, tuple]) -> list[Tensor]:
    """What is handed across at the highest resolution."""
    skips, block = [x], unet.down_blocks[0]
    for resnet, transformer in zip(block.resnets, block.attentions):
        x = unet.run(transformer, unet.run(resnet, x, temb), *context.get("down.0", ()))
        skips.append(x)
    return skips
