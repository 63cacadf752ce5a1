"""The weights that a flow transformer begins its training from nothing with."""

from __future__ import annotations

import torch
from torch import nn

from ldm.nn.mmdit import AdaNorm, MMDiT, MMDiTConfig, TextTimeEmbedding

SMALL = 0.02  # standard deviation of the embeddings' layers


def new_mmdit(config: MMDiTConfig) -> MMDiT:
    """A transformer with random weights, as DiT begins (Peebles & Xie 2023, "adaLN-Zero"): every block is the identity
    and the answer is 0, for all that a block's gates, and the last layer, multiply is 0."""
    network = MMDiT(config)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                layer.bias.zero_()
            elif isinstance(layer, nn.Conv2d) and layer.bias is not None:  # patches: as the linear layer that it is
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
                layer.bias.zero_()
        for part in network.modules():
            if isinstance(part, TextTimeEmbedding):
                for layer in (one for one in part.modules() if isinstance(one, nn.Linear)):
                    nn.init.normal_(layer.weight, std=SMALL)
            elif isinstance(part, AdaNorm):
                nn.init.zeros_(part.linear.weight)
        nn.init.zeros_(network.proj_out.weight)
    return network
