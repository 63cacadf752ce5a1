"""Latents and text embeddings of a dataset, computed once and stored by content.

Latents are stored as mean and standard deviation, so that each epoch samples anew. Every caption of a sample is stored,
and the empty text, so that captions are still chosen and dropped in each epoch. The key of an entry is all that it
depends on: the image's bytes, the view and the autoencoder, or the caption and the text encoder, and the dtype. So an
edited image or caption gets a new entry, and no other entry is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm import files
from ldm.config import require
from ldm.console import StopRequest, progress, say
from ldm.data.cache.shards import SHARD_BYTES, Shards
from ldm.data.transforms import View, pixels, to_float
from ldm.errors import DataError, Interrupted, LdmError, NumericsError
from ldm.files import format_bytes

FORMAT = 2  # of the entries; raised when pixels or latents are computed in another way (2: colours are in sRGB)
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # (1, 3, H, W) in [-1, 1] -> mean, std
Embed = Callable[[list[str]], Mapping[str, Tensor]]  # one text -> tensors (1, …) by name
Open = Callable[[int], tuple[Image.Image, str]]  # position -> upright RGB image, identity of what was read


@dataclass(frozen=True)
class CachedSample:
    """What the cache shall store of one sample; its image is not opened to know it."""

    name: str  # for messages
    identity: str  # sha256 of the file's bytes, and of how it is opened (background, reduced size)
    views: tuple[View, ...]  # all that training may ask for
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CacheReport:
    """What `Cache.prepare` did, in entries (a view of an image, or a caption); kept + made + failed are all of them."""

    kept: int  # present and sound
    made: int
    damaged: int  # of those made: present, but not sound
    failed: int  # their images could not be opened or encoded
    bytes: int  # on the disk, unused entries included
    unused: int  # entries that this dataset does not ask for


class Cache:
    """A folder of latents and text embeddings for one autoencoder and one text encoder, locked while it is open.

    A closed cache can still be read: shards are never changed, and each entry checks itself.

    The ids hold all that the encoders' values depend on: the weights' sha256, clip_skip, the dtype they run in. `dtype`
    is that of the stored floating tensors: fp32 (as the encoder returned them) or bf16 (half the space, 3 digits).
    Raises ConfigError, and ResourceError where another process has locked the folder or it cannot be written.
    """

    def __init__(
        self, folder: str | Path, vae_id: str, text_id: str, dtype: str = "fp32", shard_bytes: int = SHARD_BYTES
    ):
        require(dtype in DTYPES, f"must be fp32 or bf16, got {dtype!r}", "dtype")
        self.folder, self.vae_id, self.text_id, self.dtype = Path(folder), vae_id, text_id, dtype
        self._shards = Shards(folder, shard_bytes)

    def __enter__(self) -> Cache:
        self._shards.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._shards.__exit__(*exc)

    def reload(self) -> None:
        """Read the entries that another process of the same run has prepared. Takes no lock and changes nothing."""
        self._shards.reload()

    def latents(self, identity: str, view: View) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of an image's latents, two fp32 (C, h, w). Raises DataError."""
        entry = self._get(self._latent_key(identity, view), f"the image {identity}")
        return entry["mean"].float(), entry["std"].float()

    def text(self, caption: str) -> dict[str, Tensor]:
        """The tensors of a caption as `embed` names them, without its first dimension, in `dtype`. Raises DataError."""
        return self._get(self._text_key(caption), f"the caption {caption[:60]!r}")

    def _get(self, key: str, what: str) -> dict[str, Tensor]:
        there, entry = key in self._shards, self._shards.get(key)
        if entry is None:
            what = f"the entry of {what} was damaged after it had been checked" if there else f"has no entry of {what}"
            raise DataError(what, where=self.folder, hint="prepare the cache again")
        return entry

    def _latent_key(self, identity: str, view: View) -> str:
        return _key("latents", FORMAT, self.vae_id, self.dtype, identity, *dataclasses.astuple(view))

    def _text_key(self, caption: str) -> str:
        return _key("text", FORMAT, self.text_id, self.dtype, caption)

    def prepare(
        self,
        samples: Sequence[CachedSample],
        open_image: Open,
        encode: Encode,
        embed: Embed | None,
        failed: Callable[[int, LdmError], None] | None = None,
    ) -> CacheReport:
        """Check every entry that the samples need and compute those that are missing or damaged.

        Images and texts are encoded one at a time, so that no value depends on the others; without `embed` no text
        is stored. The disk space is checked and printed after the first entry of a kind. `failed` is called with each
        position whose image cannot be used, and may raise; without it the first such image ends the work. A kill costs
        at most a minute of work; SIGINT and SIGTERM finish the image, save and raise Interrupted. Raises ResourceError,
        and NumericsError for texts that are not finite.
        """
        views: dict[str, tuple[View, list[int]]] = {}  # images that are equal share their entries
        for position, sample in enumerate(samples):
            for view in sample.views:
                views.setdefault(self._latent_key(sample.identity, view), (view, []))[1].append(position)
        captions = dict.fromkeys(["", *(caption for s in samples for caption in s.captions)] if embed else ())
        texts = {self._text_key(caption): caption for caption in captions}
        unused = len(self._shards.known() - views.keys() - texts.keys())
        missing, damaged = self._missing([*texts, *views])
        told: set[int] = set()  # positions whose images failed

        @functools.lru_cache(maxsize=1)  # the views of an image come one after the other
        def opened(position: int) -> Image.Image:
            image, identity = open_image(position)
            if identity != samples[position].identity:
                raise DataError("was changed while the cache was prepared", hint="run the same again")
            return image

        def make_text(key: str) -> None:
            tensors = embed([texts[key]])
            self._put(key, {name: tensor[0] for name, tensor in tensors.items()}, f"the caption {texts[key][:60]!r}")

        def make_view(key: str) -> None:
            view, positions = views[key]
            for position in positions:
                try:
                    mean, std = encode(to_float(pixels(opened(position), view))[None])
                    return self._put(key, {"mean": mean[0], "std": std[0]}, samples[position].name)
                except (DataError, NumericsError) as error:
                    if error.where is None:
                        error = type(error)(error.what, where=samples[position].name, hint=error.hint)
                    if failed is None:
                        raise error from None
                    if position not in told:
                        told.add(position)
                        failed(position, error)

        with StopRequest() as stop:
            try:
                self._make("captions", {key: 1 for key in texts if key in missing}, make_text, stop)
                areas = {key: view.size.area for key, (view, _) in views.items() if key in missing}
                self._make("latents", areas, make_view, stop)
            except BaseException:
                with contextlib.suppress(LdmError):  # only the first error is reported
                    self._shards.flush()
                raise
            self._shards.flush()
        lost = sum(key not in self._shards for key in missing)
        kept = len(texts) + len(views) - len(missing)
        return CacheReport(kept, len(missing) - lost, damaged, lost, self._shards.bytes, unused)

    def _missing(self, keys: list[str]) -> tuple[set[str], int]:
        """The keys that are missing or damaged, and how many of them are damaged."""
        there = [key for key in keys if key in self._shards]
        bar = progress(there, desc="checking the cache", unit="entry")
        damaged = {key for key in bar if self._shards.get(key) is None}
        return {*keys} - {*there} | damaged, len(damaged)

    def _make(self, what: str, jobs: Mapping[str, int], make: Callable[[str], None], stop: StopRequest) -> None:
        """Make every entry (`jobs`: key -> its share of the work); print the disk space needed after the first."""
        announced = False
        with torch.no_grad(), progress(total=len(jobs), desc=f"preparing {what}", unit="entry") as bar:
            for key, share in jobs.items():
                before = self._shards.bytes
                make(key)
                bar.update()
                grown = self._shards.bytes - before
                if not announced and key in self._shards:
                    announced = True
                    self._announce(what, len(jobs), grown * sum(jobs.values()) // share)
                if stop.signal:
                    self._shards.flush()
                    stopped = "stopped while the cache was prepared; what is done is kept"
                    raise Interrupted(stop.signal, stopped, where=self.folder, hint="run the same again to go on")

    def _announce(self, what: str, count: int, needed: int) -> None:
        files.require_space(self.folder, needed)
        free = shutil.disk_usage(self.folder).free
        say(f"cache: {count} {what} to prepare, {format_bytes(needed)} in {self.folder} ({format_bytes(free)} free)")

    def _put(self, key: str, tensors: Mapping[str, Tensor], where: str) -> None:
        kind = getattr(torch, DTYPES[self.dtype])
        cast = {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}
        if not all(bool(torch.isfinite(t).all()) for t in cast.values()):
            raise NumericsError("encoding gave NaN or infinity", where=where, hint="encode in fp32")
        self._shards.put(key, cast)


def _key(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
