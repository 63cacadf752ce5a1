"""What a run of the U-Net makes of its texts alone, computed at the first step and read at all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class TextCache:
    """Keys and values of each cross-attention and the text's time embedding, for one batch of texts at a time.

    It belongs to one run, in which no weight changes. A step with other texts (prompt editing) empties it.
    """

    def __init__(self) -> None:
        self._states: Tensor | None = None
        self.made: dict[nn.Module, Any] = {}

    def follow(self, states: Tensor) -> None:
        """Forget all that was made of other texts than these (B, S, D); texts are told apart by identity."""
        if states is not self._states:
            self._states = states
            self.made.clear()


def remember(cache: TextCache | None, module: nn.Module, make: Callable[[], T]) -> T:
    """What `make` returned for this module at a run's first step; without a cache it is made each time."""
    if cache is None:
        return make()
    if module not in cache.made:
        cache.made[module] = make()
    return cache.made[module]
