"""Linear readers of a text encoder: what one linear layer can tell from the mean of its states.

B texts   S tokens   D width of the states
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = 10.0  # of the logits: under Adam the readers then learn ten times as fast as the text encoder beside them
# What each label counts in the loss, as emoji.labels.Labels orders them.
WEIGHTS = {"object": 1.0, "colour": 0.3, "first": 0.7, "last": 0.7, "axis": 0.3, "count": 0.2}


class Readers(nn.Module):
    """One linear layer for each label, on mean states that are standardised by `mean` and `std`, (D,) each."""

    mean: Tensor
    std: Tensor

    def __init__(self, sizes: Mapping[str, int], mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.layers = nn.ModuleDict({name: nn.Linear(len(mean), size) for name, size in sizes.items()})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, means: Tensor) -> dict[str, Tensor]:
        """Mean states (B, D) -> logits (B, values) of each label."""
        x = (means - self.mean) / self.std
        return {name: GAIN * layer(x) for name, layer in self.layers.items()}


def reading_loss(told: Mapping[str, Tensor], labels: Tensor, order: float) -> Tensor:
    """Cross entropy of every label that there is, weighed, and `order` times that of which of two objects is where.

    labels: (B, number of labels), negative where there is nothing to read.
    """
    total = labels.new_zeros((), dtype=torch.float32)
    for (name, weight), wanted in zip(WEIGHTS.items(), labels.T):
        if (wanted >= 0).any():
            total = total + weight * F.cross_entropy(told[name].float(), wanted)
    margin = order_margin(told, labels)
    return total + order * F.softplus(-margin).mean() if len(margin) else total


def order_margin(told: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """How much more the readers believe in the order of each pair than in its mirror: (pairs,), right above 0."""
    first, last = list(WEIGHTS).index("first"), list(WEIGHTS).index("last")
    rows = (labels[:, first] >= 0).nonzero()[:, 0]
    a, b = labels[rows, first], labels[rows, last]
    ahead, behind = told["first"].float(), told["last"].float()
    return ahead[rows, a] + behind[rows, b] - ahead[rows, b] - behind[rows, a]
