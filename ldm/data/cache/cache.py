"""Latents and text embeddings of a dataset, made once and kept by content.

Latents are kept as mean and standard deviation, so that each epoch samples anew; every caption of a sample is kept,
and the empty text, so that choice and dropout stay live. What an entry depends on is its key: the picture's bytes, the
view of it, the autoencoder; the caption, the text encoder; the type of the numbers. So an edited picture or caption
is another entry, and no other one has to be made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import files
from ldm.config import require
from ldm.console import StopRequest, progress, say
from ldm.data.cache.shards import SHARD_BYTES, Shards
from ldm.data.transforms import View, pixels, to_float
from ldm.errors import DataError, Interrupted, LdmError, NumericsError

if TYPE_CHECKING:
    import torch
    from PIL import Image

FORMAT = 1  # of what is kept; raised when pixels or latents come about in another way
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

Encode = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]  # (1, 3, H, W) in [-1, 1] -> mean, std
Embed = Callable[[list[str]], Mapping[str, "torch.Tensor"]]  # one text -> tensors (1, …) by name
Open = Callable[[int], tuple["Image.Image", str]]  # position -> upright RGB picture, identity of what was read


@dataclass(frozen=True)
class Wanted:
    """What the cache is to hold of one sample, told without opening its picture."""

    name: str  # for messages
    identity: str  # sha256 of the file's bytes, and of how it is opened: the ground, a fraction of its size
    views: tuple[View, ...]  # all that training may ask for
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """What `Cache.prepare` found and did, in entries (a view of a picture; a caption): each sum is what was wanted."""

    kept: int  # there, and sound
    made: int
    damaged: int  # of those made: there, but not sound
    failed: int  # of pictures that could not be opened or encoded
    bytes: int  # on the disk, other entries included
    others: int  # entries that this dataset does not ask for


class Cache:
    """A folder of latents and text embeddings for one autoencoder and one text encoder, locked while it is open.

    What was prepared can still be read when it is closed: shards are never changed, and each entry checks itself.

    The ids are all that the encoders' values depend on: the weights' sha256, clip_skip, the type they run in. `dtype`
    is what floating tensors are kept in: fp32 (as the encoder gave them) or bf16 (half the room, 3 digits). Raises
    ConfigError, and ResourceError where another process has the folder or it cannot be written.
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

    def look(self) -> None:
        """Read what another process of the same run has prepared, without the lock. Changes nothing."""
        self._shards.look()

    def latents(self, identity: str, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of a picture's latents, two fp32 (C, h, w). Raises DataError."""
        found = self._get(self._latent_key(identity, view), f"the picture {identity}")
        return found["mean"].float(), found["std"].float()

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """The tensors of a caption as `embed` names them, without its first dimension, in `dtype`. Raises DataError."""
        return self._get(self._text_key(caption), f"the caption {caption[:60]!r}")

    def _get(self, key: str, what: str) -> dict[str, torch.Tensor]:
        there, found = key in self._shards, self._shards.get(key)
        if found is None:
            what = f"the entry of {what} was damaged after it had been checked" if there else f"has no entry of {what}"
            raise DataError(what, where=self.folder, todo="prepare the cache again")
        return found

    def _latent_key(self, identity: str, view: View) -> str:
        return _key("latents", FORMAT, self.vae_id, self.dtype, identity, *dataclasses.astuple(view))

    def _text_key(self, caption: str) -> str:
        return _key("text", FORMAT, self.text_id, self.dtype, caption)

    def prepare(
        self,
        samples: Sequence[Wanted],
        open_picture: Open,
        encode: Encode,
        embed: Embed | None,
        failed: Callable[[int, LdmError], None] | None = None,
    ) -> Prepared:
        """Check every entry that the samples need and make those that are missing or damaged.

        Pictures and texts are encoded one at a time, so that no value depends on the others; without `embed` no text
        is kept. The disk use is said, and asked for, as soon as the first of a kind is made. `failed` hears of
        positions whose picture cannot be used and may raise; without it the first ends the work. A kill costs a minute
        of work at most; SIGINT and SIGTERM finish the picture, save and raise Interrupted. Raises ResourceError,
        NumericsError for texts that are not finite.
        """
        views: dict[str, tuple[View, list[int]]] = {}  # pictures that are equal share their entries
        for position, sample in enumerate(samples):
            for view in sample.views:
                views.setdefault(self._latent_key(sample.identity, view), (view, []))[1].append(position)
        captions = dict.fromkeys(["", *(caption for s in samples for caption in s.captions)] if embed else ())
        texts = {self._text_key(caption): caption for caption in captions}
        others = len(self._shards.known() - views.keys() - texts.keys())
        missing, damaged = self._missing([*texts, *views])
        pictures = _Pictures(samples, open_picture, failed)

        def make_text(key: str) -> None:
            tensors = embed([texts[key]])
            self._put(key, {name: tensor[0] for name, tensor in tensors.items()}, f"the caption {texts[key][:60]!r}")

        def make_view(key: str) -> None:
            view, positions = views[key]
            for position in positions:
                with pictures.judged(position):
                    mean, std = encode(to_float(pixels(pictures.open(position), view))[None])
                    return self._put(key, {"mean": mean[0], "std": std[0]}, samples[position].name)

        with StopRequest() as stop:
            try:
                self._make("captions", {key: 1 for key in texts if key in missing}, make_text, stop)
                areas = {key: view.size.area for key, (view, _) in views.items() if key in missing}
                self._make("latents", areas, make_view, stop)
            except BaseException:
                with contextlib.suppress(LdmError):  # the first error is the one to be told
                    self._shards.flush()
                raise
            self._shards.flush()
        lost = sum(key not in self._shards for key in missing)
        kept = len(texts) + len(views) - len(missing)
        return Prepared(kept, len(missing) - lost, damaged, lost, self._shards.bytes, others)

    def _missing(self, keys: list[str]) -> tuple[set[str], int]:
        """Those that are not there or damaged, and how many of them are damaged."""
        there = [key for key in keys if key in self._shards]
        bar = progress(there, desc="checking the cache", unit="entry")
        damaged = {key for key in bar if self._shards.get(key) is None}
        return {*keys} - {*there} | damaged, len(damaged)

    def _make(self, what: str, jobs: Mapping[str, int], make: Callable[[str], None], stop: StopRequest) -> None:
        """Make every entry (`jobs`: key -> its share of the work); after the first, say what all will take."""
        import torch

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
                    told = "stopped while the cache was prepared; what is done is kept"
                    raise Interrupted(stop.signal, told, where=self.folder, todo="run the same again to go on")

    def _announce(self, what: str, count: int, needed: int) -> None:
        files.require_space(self.folder, needed)
        free = shutil.disk_usage(self.folder).free
        say(f"cache: {count} {what} to prepare, {_megabytes(needed)} in {self.folder} ({_megabytes(free)} free)")

    def _put(self, key: str, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        import torch

        kind = getattr(torch, DTYPES[self.dtype])
        cast = {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}
        if not all(bool(torch.isfinite(t).all()) for t in cast.values()):
            raise NumericsError("encoding gave NaN or infinity", where=where, todo="encode in fp32")
        self._shards.put(key, cast)


class _Pictures:
    """The samples' pictures, opened once for all of their views, and which of them cannot be used."""

    def __init__(self, samples: Sequence[Wanted], open_picture: Open, failed: Callable[[int, LdmError], None] | None):
        self._samples, self._open, self._failed = samples, open_picture, failed
        self._last: tuple[int, Image.Image] | None = None  # the views of a picture come one after the other
        self._bad: set[int] = set()

    def open(self, position: int) -> Image.Image:
        """Raises DataError where the file is another by now."""
        if self._last is None or self._last[0] != position:
            self._last = None
            picture, identity = self._open(position)
            if identity != self._samples[position].identity:
                raise DataError("was changed while the cache was prepared", todo="run the same again")
            self._last = (position, picture)
        return self._last[1]

    @contextlib.contextmanager
    def judged(self, position: int) -> Iterator[None]:
        """Hand what the block raises for this picture to `failed`, once for each, with its name."""
        try:
            yield
        except (DataError, NumericsError) as error:
            if position in self._bad:
                return
            self._bad.add(position)
            if error.where is None:
                error = type(error)(error.what, where=self._samples[position].name, todo=error.todo)
            if self._failed is None:
                raise error from None
            self._failed(position, error)


def _key(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e9:.1f} GB"
