"""A model at work: which it is, where its parts are, with which LoRAs. Pipeline and ldm.render draw with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.errors import ConfigError, ModelError, NumericsError
from ldm.images import to_pil
from ldm.pipeline.adapters import Adapter, Adapters
from ldm.pipeline.drawing import ImageRequest, Watch, batches, draw
from ldm.pipeline.metadata import dtype_name

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ldm.checkpoint import Model
    from ldm.checkpoint.describe import ModelInfo
    from ldm.pipeline.encode import Encoder
    from ldm.pipeline.request import Settings


class Engine:
    """Draws pictures with one model. Its arguments are Pipeline's; raises as Pipeline does and reads no weight."""

    def __init__(
        self,
        model: str | os.PathLike | Model,
        *,
        vae: str | os.PathLike | None = None,
        prediction_type: str | None = None,
        device: Any = "auto",
        dtype: Any = "auto",
        offload: bool = False,
        attention: str = "auto",
        allow_unapplied: bool = False,
    ):
        from ldm.pipeline.placement import Placement

        self.model, self.vae, self.prediction_type = model, vae, prediction_type
        self.device, self.dtype = _place(model, device, dtype, offload)
        self.work = Placement(self.device, offload, attention)
        self.info = _describe(model, vae, prediction_type)
        self._adapters = Adapters(allow_unapplied)
        self._encoder: Encoder | None = None  # the one used last

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise ModelError where a LoRA does not fit the model; reads headers alone."""
        self._adapters.check(adapters, self.model, self.prediction_type)

    def load(self, dtype: torch.dtype | None = None) -> Model:
        """The model, from the cache of loaded ones where it is there."""
        from ldm.checkpoint import load_model

        if not isinstance(self.model, (str, os.PathLike)):
            return self.model
        asked = {"vae": self.vae, "prediction_type": self.prediction_type}
        return load_model(self.model, device=self.work.home, dtype=dtype or self.dtype, **asked)

    def adapted(self, model: Model, adapters: tuple[Adapter, ...]) -> Model:
        """A loaded model with these LoRAs, and the attention that was asked for."""
        return self._adapters.model(self.work.model(model), adapters)

    def draw(
        self,
        settings: Settings,
        pictures: Sequence[ImageRequest],
        batch_size: int,
        watch: Callable[[Sequence[int], int, torch.Tensor, torch.Tensor], Any],
    ) -> Iterator[tuple[int, Image.Image, dict[str, Any]]]:
        """(its number, the picture, what its record has to say) of each, batch by batch, in no certain order.

        settings    resolved for this model
        watch       called as (numbers, i, x, x0) after step i of each batch
        A picture that is NaN is drawn again in fp32, alone. Raises NumericsError where that does not help or fp32 is
        what was tried; ResourceError out of memory.
        """
        import torch

        if self.device.type == "cuda" and self.dtype == torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # fp32 is what was asked for
        model = self.load()
        for rows in batches(pictures, model.text, settings, batch_size):
            adapted = self.adapted(model, pictures[rows[0]].adapters)
            own = [pictures[row] for row in rows]
            images = self._draw(adapted, settings, own, lambda *step, rows=rows: watch(rows, *step))
            for row, image in zip(rows, images):
                notes = {key: value for key, value in adapted.info.items() if key == "lora"}
                if not torch.isfinite(image).all():
                    image = self._draw_in_fp32(settings, pictures[row])
                    notes["dtype"] = "fp32"
                yield row, to_pil(image[None])[0], notes

    def _draw(self, model: Model, settings: Settings, pictures: Sequence[ImageRequest], watch: Watch) -> torch.Tensor:
        """One batch of pictures (B, 3, H, W), with a model that has their LoRAs."""
        return draw(model, self.work, self._encoding(model, settings), settings, pictures, watch)

    def _draw_in_fp32(self, settings: Settings, picture: ImageRequest) -> torch.Tensor:
        """A picture (3, H, W) once more; raises NumericsError where fp32 is what was tried or does not help."""
        import torch

        half = self.dtype != torch.float32
        if half and isinstance(self.model, (str, os.PathLike)):
            console.warn(f"seed {picture.seed}: NaN in {dtype_name(self.dtype)}, drawing it again in fp32")
            model = self.adapted(self.load(torch.float32), picture.adapters)
            (image,) = self._draw(model, settings, [picture], lambda *step: None)
            if torch.isfinite(image).all():
                return image
            half = False
        what = f"the picture of {picture.prompt[:60]!r}, seed {picture.seed}, holds NaN or infinity"
        raise NumericsError(what, todo="use dtype fp32" if half else "check the model's weights")

    def _encoding(self, model: Model, settings: Settings) -> Encoder:
        """The encoder of a model's texts, with what it has encoded already where it was the last."""
        from ldm.pipeline.encode import Encoder

        wanted, own = (model.text, settings.clip_skip, settings.emphasis), self._encoder
        if own is None or (own.text, own.clip_skip, own.emphasis) != wanted:
            self._encoder = Encoder(model.text, self.work, model.dtype, settings.clip_skip, settings.emphasis)
        return self._encoder


def _place(model: Any, device: Any, dtype: Any, offload: bool) -> tuple[torch.device, torch.dtype]:
    """The device and dtype to use; those of a model that is loaded already (its dtype alone where parts are lent)."""
    from ldm.checkpoint import Model
    from ldm.device import pick_device, pick_dtype

    device, dtype = str(device), dtype_name(dtype)  # torch's own objects are taken too
    picked = pick_device(device)
    wanted = pick_dtype(dtype, picked)
    if isinstance(model, (str, os.PathLike)):
        return picked, wanted
    if not isinstance(model, Model):
        raise ConfigError(f"expected a name, a path or a loaded model, got {type(model).__name__}", where="model")
    if device != "auto" and model.device.type != picked.type and not offload:
        raise ConfigError(f"the given model is on {model.device}, not {picked}", where="device")
    if dtype != "auto" and model.dtype != wanted:
        raise ConfigError(f"the given model is loaded in {dtype_name(model.dtype)}", where="dtype")
    return picked if offload else model.device, model.dtype


def _describe(model: Any, vae: Any, prediction_type: str | None) -> ModelInfo:
    """What is known of the model, which is not loaded yet."""
    from ldm.checkpoint.describe import describe

    if vae is not None and not isinstance(vae, (str, os.PathLike)):
        raise ConfigError(f"expected a folder or a file, got {type(vae).__name__}", where="vae")
    if vae is not None and not isinstance(model, (str, os.PathLike)):
        raise ConfigError("a loaded model has its VAE already", where="vae")
    if vae is not None and not Path(vae).exists():
        raise ModelError("no such VAE", where=vae)
    if prediction_type is not None and not isinstance(model, (str, os.PathLike)):
        raise ConfigError("a loaded model has its schedule already", where="prediction_type")
    return describe(model, vae, prediction_type)
