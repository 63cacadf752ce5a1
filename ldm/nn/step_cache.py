"""Deep features of a U-Net that are reused by the next steps (DeepCache, Ma et al. 2024): faster, and inexact.

From one step to the next the deep levels change little. What enters the last level on the way up is kept, and the calls
that follow compute only the highest resolution: the first level down and the last one up.
"""

from __future__ import annotations

from torch import Tensor


class StepCache:
    """The deep features of one run, computed anew in every n-th call, and where texts or the number of rows change."""

    def __init__(self, every: int):
        self.every = every
        self._kept: Tensor | None = None  # (B, C, H, W)
        self._states: Tensor | None = None
        self._age = 0  # calls since it was made

    def recall(self, states: Tensor, rows: int) -> Tensor | None:
        """What is kept, for a call with these text states and so many rows; None where it has to be made."""
        fits = self._kept is not None and self._states is states and len(self._kept) == rows
        if fits and self._age < self.every - 1:
            self._age += 1
            return self._kept
        self._states, self._age = states, 0
        return None

    def keep(self, deep: Tensor) -> None:
        self._kept = deep
