"""CLIP's vision tower, a user's, as IP-Adapters look at images through it.

Shapes:  S tokens of an image   F width of the tower   P width of the projected vector
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.nn.weights import load_weights, on_meta

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images (Radford et al. 2021), R, G, B in 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTower(nn.Module):
    """transformers' CLIPVisionModelWithProjection, and how an image becomes its input."""

    def __init__(self, config: Mapping[str, Any]):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        settings: Any = CLIPVisionConfig.from_dict(dict(config))
        self.side, self.width, self.projected = settings.image_size, settings.hidden_size, settings.projection_dim
        self.model = CLIPVisionModelWithProjection(settings)

    @property
    def tokens(self) -> int:
        """Of an image, the one that stands for the whole image included."""
        return self.model.vision_model.embeddings.num_positions

    @torch.no_grad()
    def forward(self, image: Image.Image | None, pooled: bool) -> Tensor:
        """An RGB image -> its projected vector (1, P), or the tokens of the last layer but one (1, S, F).

        None is what stands in the place of an image without guidance: a vector of zeros, or the tokens of mean grey.
        """
        weight = self.model.visual_projection.weight
        if image is None and pooled:
            return weight.new_zeros(1, self.projected)
        empty = torch.zeros(1, 3, self.side, self.side)
        values = (empty if image is None else pixels(image, self.side)).to(weight)
        if pooled:
            return self.model(pixel_values=values).image_embeds
        return self.model(pixel_values=values, output_hidden_states=True).hidden_states[-2]


def pixels(image: Image.Image, side: int) -> Tensor:
    """An RGB image -> (1, 3, side, side): its shorter side resized, its middle cut out, normalised as CLIP's."""
    w, h = image.size
    short = min(w, h)
    w, h = (side, int(side * h / w)) if w == short else (int(side * w / h), side)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - side) // 2, (h - side) // 2
    values = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def load_vision(config: Mapping[str, Any], state: Mapping[str, Tensor], where: object = None) -> VisionTower:
    """A tower in eval mode with the tensors of `state` themselves. Raises ModelError where they do not fit."""
    tower = on_meta(lambda: VisionTower(config))
    load_weights(tower.model, state, where)
    for name, buffer in list(tower.named_buffers()):  # not in the files: the positions 0, 1, 2, …
        if buffer.is_meta:
            positions = torch.arange(buffer.shape[-1], device=tower.model.visual_projection.weight.device)
            setattr(
                tower.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], positions.expand(buffer.shape)
            )
    return tower.eval().requires_grad_(False)
