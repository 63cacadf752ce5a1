"""Depth and surface normals of a photo, by a depth model of the user's (transformers' AutoModelForDepthEstimation)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.errors import ConfigError, ModelError, NumericsError

FLAT = 1.0  # slope in the depth's whole range, across 1/32 of the image, at which a surface is seen at 45°


def depth_of(image: Image.Image, model: str | Path) -> np.ndarray:
    """(H, W) in 0 to 1, near is bright, by the depth model in a folder.

    Raises ConfigError and ModelError for a folder without one, NumericsError where it gives NaN.
    """
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    folder = Path(os.path.expanduser(model))
    if not (folder / "config.json").is_file():
        hint = "give a transformers depth model's folder, such as of Depth-Anything-V2-Small-hf"
        raise ConfigError("holds no depth model", where=folder, hint=hint)
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
        network = AutoModelForDepthEstimation.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ModelError(f"is no depth model that transformers can load ({reason})", where=folder) from None
    with torch.no_grad():
        predicted = network(**processor(images=image, return_tensors="pt")).predicted_depth[:, None].float()
        size = (image.height, image.width)
        depth = torch.nn.functional.interpolate(predicted, size=size, mode="bicubic", align_corners=False)[0, 0]
    if not torch.isfinite(depth).all():
        raise NumericsError("the depth model gives NaN or infinity")
    low, high = depth.min(), depth.max()
    return ((depth - low) / (high - low).clamp(min=1e-12)).numpy()


def depth_image(depth: np.ndarray) -> Image.Image:
    """Grey levels, near is bright, as ControlNets for depth were trained."""
    return Image.fromarray(np.round(depth * 255).astype(np.uint8)).convert("RGB")


def normal_image(depth: np.ndarray) -> Image.Image:
    """Normals (x to the right, y up, z to the viewer) of a depth (H, W) as colours: (0, 0, 1) is (128, 128, 255)."""
    scale = max(depth.shape) / 32 / FLAT
    down, right = np.gradient(depth.astype(np.float64)) if min(depth.shape) > 1 else (depth * 0, depth * 0)
    normal = np.stack([-right * scale, down * scale, np.ones(depth.shape)], axis=2)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    return Image.fromarray(np.round((normal / 2 + 0.5) * 255).astype(np.uint8))
