"""ControlNets and T2I-Adapters at work: what they add to a U-Net in each step of a run.

Shapes:  B batch   H, W image size   R rows of the network, several conditions of B each
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.guidance.guided import step_at
from ldm.images import to_tensor
from ldm.nn.controlnet import ControlNet, summed
from ldm.nn.controlnet_union import ControlNetUnion
from ldm.nn.ip_adapter import unguided_rows
from ldm.nn.t2i_adapter import FeatureInput, T2IAdapter
from ldm.nn.unet import UNet
from ldm.pipeline.control import ControlSettings, Network

if TYPE_CHECKING:
    from ldm.pipeline.request import ImageRequest, Run


class Steering:
    """The ControlNets and T2I-Adapters of one batch in one run.

    `ready` makes a ControlNet ready for the run: ldm.pipeline.engine.prepared.
    """

    def __init__(
        self,
        nets: Sequence[Network],
        ready: Callable[[ControlNet], Callable[..., list[Tensor]]],
        settings: ControlSettings,
        requests: Sequence[ImageRequest],
        run: Run,
        device: torch.device,
    ):
        self._seen = settings.seen()
        told = [
            net.in_modes(modes) if isinstance(net, ControlNetUnion) and (modes := settings.modes_of(images)) else net
            for net, images in zip(nets, self._seen, strict=True)
        ]
        self._nets = [net if isinstance(net, T2IAdapter) else ready(net) for net in told]
        self._adapters = [isinstance(net, T2IAdapter) for net in nets]
        self._pooled = [isinstance(net, ControlNet) and net.control.global_pool_conditions for net in nets]
        self._settings = settings
        self._levels, self._step, self._batch = run.sigmas[:-1].tolist(), 0, len(requests)
        known: dict[tuple[int, str], Tensor] = {}
        columns = [[request.controls[i] for request in requests] for i in range(len(settings.scales))]
        grey = [
            "L" if isinstance(net, T2IAdapter) and net.config.in_channels == 1 else "RGB"
            for net, images in zip(nets, self._seen)
            for _ in images
        ]
        for image, mode in ((image, mode) for mode, column in zip(grey, columns) for image in column):
            if (id(image), mode) not in known:
                condition = image.condition(run.height, run.width).convert(mode)
                pixels = to_tensor(condition.convert("RGB"))[:, : 1 if mode == "L" else 3]
                known[id(image), mode] = (pixels / 2 + 0.5).to(device)
        self._images = [[known[id(image), mode] for image in column] for mode, column in zip(grey, columns)]
        self._features: dict[int, list[Tensor]] = {}
        self._input: FeatureInput | None = None
        self._whole: Tensor | None = None
        self._part: dict[str, Tensor | None] = {}

    def unet(self, unet: UNet) -> UNet:
        """The U-Net that is to draw: where there are T2I-Adapters, one that takes features."""
        if any(self._adapters):
            self._input = FeatureInput(unet)
        return unet if self._input is None else self._input.unet

    def network(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The U-Net with the residuals and the features of all that acts at the step."""

        def steered(x: Tensor, timesteps: Tensor, *, states: Tensor, **more: Any) -> Tensor:
            shown = set(self._settings.acting(self._step, len(self._levels)))
            acting = [i for i, images in enumerate(self._seen) if not shown.isdisjoint(images)]
            unguided = unguided_rows(len(x), self._batch, more)
            if self._input is not None:
                given = [self._scaled_features(i, len(x), unguided) for i in acting if self._adapters[i]]
                levels = itertools.zip_longest(*given)
                self._input.features = [
                    functools.reduce(torch.add, [f for f in one if f is not None]) for one in levels
                ]
            acting = [i for i in acting if not self._adapters[i]]
            if not acting:
                return network(x, timesteps, states=states, **more)
            text = {"states": states, "mask": more.get("mask"), "pooled": more.get("pooled")}
            residuals = summed([self._residuals(i, shown, x, timesteps, text, unguided) for i in acting])
            return network(x, timesteps, states=states, residuals=residuals, **more)

        return steered

    def following(self, denoise: Denoise) -> Denoise:
        """`denoise`, of which it is known at which step it is called."""

        def at_step(x: Tensor, sigma: Tensor) -> Tensor:
            self._step = step_at(float(sigma[0]), self._levels)
            return denoise(x, sigma)

        return at_step

    def _scaled_features(self, i: int, rows: int, unguided: int) -> list[Tensor]:
        """Of one T2I-Adapter for all rows; in guess mode zeros for the first `unguided` of them."""
        (j,) = self._seen[i]
        if i not in self._features:  # each image alone, so that its bits do not depend on the others
            alone = {id(image): self._nets[i](image) for image in self._images[j]}
            self._features[i] = [torch.cat(level) for level in zip(*(alone[id(image)] for image in self._images[j]))]
        found = [
            feature.repeat(rows // self._batch, 1, 1, 1) * self._settings.scales[j] for feature in self._features[i]
        ]
        for feature in found if self._settings.guess_mode else ():
            feature[:unguided] = 0
        return found

    def _residuals(
        self,
        i: int,
        shown: Container[int],
        x: Tensor,
        timesteps: Tensor,
        text: Mapping[str, Tensor | None],
        unguided: int,
    ) -> list[Tensor]:
        """Of one ControlNet, by those of its images that are `shown`, for R rows; in guess mode zeros for the first
        `unguided` of them."""
        guess = self._settings.guess_mode or self._pooled[i]
        skip = unguided if guess else 0
        if skip:
            text, x, timesteps = self._later_rows(text, skip), x[skip:], timesteps[skip:]
        images = [torch.cat(self._images[j]) for j in self._seen[i]]
        scales = [self._settings.scales[j] if j in shown else 0.0 for j in self._seen[i]]
        seen = {"image": images, "scale": scales} if len(images) > 1 else {"image": images[0], "scale": scales[0]}
        found = self._nets[i](x, timesteps, **text, **seen, guess=guess)
        return [torch.cat([one.new_zeros(skip, *one.shape[1:]), one]) for one in found] if skip else found

    def _later_rows(self, text: Mapping[str, Tensor | None], skip: int) -> dict[str, Tensor | None]:
        """The text of the rows from `skip` on; the same tensors as long as the text is the same."""
        if self._whole is not text["states"]:
            self._whole = text["states"]
            self._part = {name: None if t is None else t[skip:] for name, t in text.items()}
        return self._part
