"""Latents and text embeddings for batches: from memory, from the cache, or encoded when they are needed.

Shapes:  B images or texts   C, h, w latent channels, height, width   H, W image size
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.cache import Cache
from ldm.data.transforms import View, pixels, to_float
from ldm.errors import DataError, NumericsError
from ldm.nn.text import TextEncoder
from ldm.nn.vae import VAE
from ldm.training.data.images import ImageSet

ENCODED_AT_ONCE = 8 * 3 * 256 * 256  # numbers of the images that the autoencoder encodes in one call
MEMORY = 2 << 30  # bytes of entries that are kept in memory at most, and at most a quarter of the free memory


class Encoders:
    """The autoencoder and the text encoder in their own precision, also inside of autocast.

    `ids` are the sha256 of their weights, which name the entries of a cache.
    """

    def __init__(self, vae: VAE, text: TextEncoder, ids: tuple[str, str], device: torch.device):
        self.vae, self.text, self.device = vae.to(device), text.to(device), device
        self.vae_id = f"{ids[0]} {vae.dtype} {vae.scaling_factor} {vae.shift_factor}"
        self.text_id = f"{ids[1]} {text.dtype} {getattr(text, 'zero_empty', '')}"

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and std of the scaled latents, fp32 (B, C, h, w) on the CPU.

        Where 16 bits overflow they are encoded in fp32. Raises NumericsError where that is not finite either.
        """
        vae, kind = self.vae, self.vae.dtype
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            try:
                mean, std = vae.moments(images)
            except NumericsError:
                if kind == torch.float32:
                    raise
                try:
                    mean, std = vae.to(torch.float32).moments(images)
                finally:
                    vae.to(kind)
        return mean.cpu(), std.cpu()

    def embed(self, texts: list[str], together: bool = False) -> dict[str, Tensor]:
        """States, pooled and mask of texts, those that the encoder has, on the CPU; "" is embedded as None.

        One by one, so that the bits of each are always the same; or `together`, which is faster, and takes no "".
        """
        together = together and hasattr(self.text, "encode_together")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            encode = self.text.encode_together if together else self.text.encode
            cond = encode([text or None for text in texts])
        named = {"states": cond.states, "pooled": cond.pooled, "mask": cond.mask}
        return {name: tensor.cpu() for name, tensor in named.items() if tensor is not None}


class Memory:
    """Tensors that are kept until the memory is full; none is removed, for an epoch needs each exactly once."""

    def __init__(self, limit: int = MEMORY):
        self.room = min(limit, available() // 4)
        self._kept: dict[Hashable, tuple[Tensor | None, ...]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
        tensors = self._kept.get(key)
        if tensors is None:
            tensors = make()
            size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
            if size <= self.room:
                self._kept[key] = tensors
                self.room -= size
        return tensors


class Cached:
    """Latents of a filled cache: `latents` gives mean and std, two fp32 (C, h, w)."""

    def __init__(self, images: ImageSet, cache: Cache, memory: Memory):
        self.images, self.cache, self.memory = images, cache, memory

    def latents(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        digest = self.images.items[place].digest
        return self.memory.get((digest, view), lambda: self.cache.latents(digest, view))


class Live:
    """Latents of images that are read and encoded when they are needed; threads read the next ones ahead."""

    def __init__(self, images: ImageSet, encoders: Encoders, memory: Memory | None, workers: int):
        self.images, self.encoders, self.memory = images, encoders, memory  # no memory where no view comes again
        self.threads = ThreadPoolExecutor(workers, "images") if workers else None
        self._coming: dict[tuple[int, View], Future[Tensor]] = {}
        self._encoded: dict[tuple[int, View], tuple[Tensor, Tensor]] = {}  # those of this batch

    def expect(self, views: Sequence[tuple[int, View]]) -> None:
        """Read these ahead, and drop what was read ahead before and is not among them."""
        if self.threads is None:
            return
        wanted = [(place, view) for place, view in views if not self._kept(place, view)]
        for key in self._coming.keys() - set(wanted):
            self._coming.pop(key).cancel()
        for key in wanted:
            if key not in self._coming:
                self._coming[key] = self.threads.submit(self._pixels, *key)

    def latents(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        """Raises ImageError where the image is gone, DataError where it was changed, NumericsError."""
        if self.memory is None:
            return self._encoded.get((place, view)) or self._encode(place, view)
        return self.memory.get((self.images.items[place].digest, view), lambda: self._encode(place, view))

    def encode_together(self, views: Sequence[tuple[int, View]]) -> None:
        """Encode images of one size at once, which is faster, where no memory keeps them.

        Where one of them fails they are left to be encoded one by one.
        """
        self._encoded.clear()
        if self.memory is not None or len(views) < 2:
            return
        views = list(dict.fromkeys(views))
        try:
            values = torch.stack([self._read(*key) for key in views])
            parts = values.split(max(1, ENCODED_AT_ONCE // values[0].numel()))
            means, stds = zip(*(self.encoders.encode(to_float(part)) for part in parts))
        except (DataError, NumericsError):
            return
        self._encoded = dict(zip(views, zip(torch.cat(means), torch.cat(stds))))

    def _kept(self, place: int, view: View) -> bool:
        return self.memory is not None and (self.images.items[place].digest, view) in self.memory

    def _encode(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        mean, std = self.encoders.encode(to_float(self._read(place, view))[None])
        return mean[0], std[0]

    def _read(self, place: int, view: View) -> Tensor:
        coming = self._coming.pop((place, view), None)
        return coming.result() if coming else self._pixels(place, view)

    def _pixels(self, place: int, view: View) -> Tensor:
        image, digest = self.images.read(place)
        item = self.images.items[place]
        if digest != item.digest:
            raise DataError("was changed since the training began", where=f"{self.images.source.path}/{item.id}")
        return pixels(image, view)


def available() -> int:
    """Free memory in bytes, of the system and within the limit of this process's cgroup; 4 GB where it is unknown."""
    sizes = [4 << 30]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = [int(lines["MemAvailable"].split()[0]) * 1024]
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        sizes.append(max(0, limit - used))
    except (OSError, ValueError, LookupError):  # another system; no limit is "max"
        pass
    return min(sizes)
