"""A U-Net's forward as code that OpenVINO makes of it, for CPUs, where drawing is told to.

Its code is for two rows of one size, as that of ldm.nn.compiled, so that an image is the same in every batch. In bf16
OpenVINO rounds in more places than PyTorch does: at SD 1.5's size a call differs from fp32 by 7 % of the RMS, PyTorch's
by 2 %. It copies the weights for each size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.compiled import CompiledUNet, with_texts
from ldm.nn.unet import UNet

PRECISIONS = {torch.bfloat16: "bf16"}  # in which it computes; else in f32


class OpenVinoUNet(CompiledUNet):
    """Called as the U-Net is, without what a run keeps (`cache`, `deep`). The package openvino has to be there."""

    def _code(self, backend: str) -> Callable[..., Tensor]:
        self._models: dict[tuple[Any, ...], Callable[..., Any]] = {}
        return self._run

    def _takes(self) -> str:
        return "OpenVINO takes a quarter of a minute or more"

    def _run(self, kept: Sequence[Tensor], perturb_in: tuple[str, ...] = (), **given: Tensor | None) -> Tensor:
        """What `with_texts` returns, by the code for these inputs, made where it is not there yet."""
        there = {name: tensor for name, tensor in given.items() if tensor is not None}
        tensors = [_plain(tensor) for tensor in (*kept, *there.values())]
        key = (perturb_in, len(kept), *there, *(tensor.shape for tensor in tensors))
        if key not in self._models:
            network = _Plain(self.unet, kept, there, {"perturb_in": perturb_in} if perturb_in else {})
            self._models[key] = openvino_code(network, tensors, next(self.unet.parameters()).dtype)
        (found,) = self._models[key]([tensor.numpy() for tensor in tensors]).values()
        x = there["x"]
        return torch.from_numpy(found).to(x.dtype)


class _Plain(nn.Module):
    """A U-Net on texts that are given, as a function of tensors of fp32, whole numbers and truth values."""

    def __init__(self, unet: UNet, kept: Sequence[Tensor], given: dict[str, Tensor], fixed: dict[str, Any]):
        super().__init__()
        self.unet: Any = unet
        self._fixed, self._names, self._kept = fixed, tuple(given), len(kept)
        self._dtypes = [tensor.dtype for tensor in (*kept, *given.values())]
        if not all(parameter.is_contiguous() for parameter in unet.parameters()):  # channels-last ends in a crash
            copied: Any = copy.deepcopy(unet)
            self.unet = copied.to(memory_format=torch.contiguous_format)

    def forward(self, *tensors: Tensor) -> Tensor:
        cast = [tensor.to(dtype) for tensor, dtype in zip(tensors, self._dtypes)]
        inputs = dict(zip(self._names, cast[self._kept :]))
        return with_texts(self.unet, kept=cast[: self._kept], **inputs, **self._fixed).float()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def openvino_code(network: nn.Module, tensors: Sequence[Tensor], dtype: torch.dtype) -> Callable[..., Any]:
    """A network's code for inputs of these shapes, computing in `dtype`: arrays of fp32 -> {output: array of fp32}."""
    import openvino  # type: ignore[import-not-found]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export about its own code
        model = openvino.convert_model(torch.export.export(network.eval(), tuple(tensors), strict=False))
    how = {"INFERENCE_PRECISION_HINT": PRECISIONS.get(dtype, "f32"), "PERFORMANCE_HINT": "LATENCY"}
    return openvino.compile_model(model, "CPU", {**how, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
