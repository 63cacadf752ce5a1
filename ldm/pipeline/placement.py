"""How a pipeline uses a model that it shares with others: which attention, and where its parts work."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ldm import console
from ldm.checkpoint import Model
from ldm.config import require
from ldm.device import check_unet_backend, missing_compiler
from ldm.nn.attention import check_backend
from ldm.nn.compiled import CompiledUNet
from ldm.nn.lora import clone_shared_weights
from ldm.nn.offload import at_work
from ldm.nn.openvino import OpenVinoUNet
from ldm.nn.vae import VAE
from ldm.pipeline.checks import check_bool


class Placement:
    """`device` is where parts work; with `offload` they are kept in main memory and go there one at a time.

    With "blocks" the blocks of a flow transformer too. Raises ConfigError for another value, and where `compile` has no
    compiler or `backend` no package.
    """

    def __init__(
        self, device: torch.device, offload: Any, attention: Any, compile: Any = False, backend: Any = "torch"
    ):
        known = isinstance(offload, bool) or offload == "blocks"
        require(known, f'expected True, False or "blocks", got {offload!r:.80}', "offload")
        self.device, self.offload, self.attention = device, offload, check_backend(attention, device)
        self.compile, self.backend = check_bool(compile, "compile"), check_unet_backend(backend, device)
        self._last: tuple[Model, Model] | None = None
        self._compiled: CompiledUNet | None = None  # of the U-Net that was used last
        if offload and device.type == "cpu":
            console.warn("offload saves nothing on a CPU")
        if self.compile:
            missing = missing_compiler(device)
            require(missing is None, f"needs {missing}; install it, or leave compile out", "compile")
            require(not offload, "the compiled network stays on the device: leave offload out", "compile")
            require(self.backend == "torch", f"{backend} compiles the network itself: leave compile out", "compile")

    @property
    def home(self) -> torch.device:
        """Where models are loaded to."""
        return torch.device("cpu") if self.offload else self.device

    def model(self, shared: Model) -> Model:
        """`shared` with this attention, in a U-Net of its own on the same weights."""
        if self.attention == "auto":
            return shared
        if self._last is None or self._last[0] is not shared:
            unet = clone_shared_weights(shared.unet)
            unet.set_attention(self.attention)
            self._last = shared, dataclasses.replace(shared, unet=unet)
        return self._last[1]

    @property
    def makes_code(self) -> str | None:
        """The setting, if any, by which a U-Net is called as code that is made of it: compile or backend."""
        return "compile" if self.compile else "backend" if self.backend != "torch" else None

    def compiled(self, unet: Any) -> CompiledUNet | None:
        """The compiled code of a U-Net, where that was asked for."""
        if self.makes_code and (self._compiled is None or self._compiled.unet is not unet):
            self._compiled = OpenVinoUNet(unet) if self.backend == "openvino" else CompiledUNet(unet)
        return self._compiled

    def on(self, part: Any) -> AbstractContextManager:
        """The U-Net, the VAE or the text encoder, ready to work while the block runs.

        On a GPU an autoencoder of 16 bits is lent in fp32: in fp16 some overflow (those of XL, `force_upcast`), and in
        bf16 an image is half a grey level off.
        """
        half = isinstance(part, VAE) and self.device.type != "cpu" and part.dtype.itemsize == 2
        if half or self.offload:
            return at_work(part, self.device, torch.float32 if half else None, self.offload == "blocks")
        return nullcontext(part)
