"""`ldm data cache`: a dataset's latents, and the embeddings of its captions, made once, on one machine or on many."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ldm import files
from ldm.checkpoint.parts import TextParts, VaePart, find_text, find_vae
from ldm.config import require
from ldm.console import StopRequest, progress, say, warn
from ldm.data.buckets import Size, bucket_of, resized
from ldm.data.cache.prepared import FORMAT, REPEATED, PartWriter, Row, read_info
from ldm.data.images import MAX_FILE, read_header, read_image
from ldm.data.masks import read_mask
from ldm.data.sources import Sample, Source, open_source
from ldm.data.sources.walk import PREPARED
from ldm.data.transforms import TransformConfig, View, draw, fixed_views, pixels, to_float
from ldm.device import DTYPES, fast_bf16, pick_device
from ldm.errors import ConfigError, DataError, Interrupted, LdmError, NumericsError
from ldm.files import format_bytes
from ldm.render.jobs.jobs import Shard
from ldm.training.data.encoded import Encoders
from ldm.training.data.images import MOST
from ldm.training.settings import FinetuneData

TRIED = 64  # files whose sizes are looked at to tell how large the images are
AHEAD = 32  # images that threads have read ahead


@dataclass(frozen=True)
class CacheSettings:
    """What a prepared dataset is made with; `data` has its images, buckets and limits."""

    data: FinetuneData
    vae: VaePart
    text: TextParts | None
    embeddings: Literal["auto", "yes", "no"]
    dtype: str
    shard: Shard
    batch_size: int
    device: torch.device


class Loaded(NamedTuple):
    """An image as it is encoded."""

    position: int
    sample: Sample
    digest: str
    view: View
    pixels: Tensor  # uint8 (3, H, W)
    mask: Tensor | None  # uint8 (1, h, w)


def cache(
    data: str | Path,
    out: str | Path,
    vae: str = "default",
    text: str | None = None,
    *,
    resolution: int = 512,
    text_2: str | None = None,
    vae_subfolder: str | None = None,
    vae_scaling_factor: float | None = None,
    text_subfolder: str | None = None,
    text_2_subfolder: str | None = None,
    embeddings: Literal["auto", "yes", "no"] = "auto",
    dtype: Literal["bf16", "fp32"] = "bf16",
    shard: str = "1/1",
    batch_size: int = 8,
    masks: bool = False,
    device: str = "auto",
    **options: Any,
) -> Path:
    """Encode a dataset once into `out`, which `ldm train` takes as `data=`; returns `out`.

    Latents are stored as mean and standard deviation, in `dtype`. With `text` the captions' embeddings are stored too,
    unless they would be larger than the images (`embeddings="yes"` stores them anyway); the captions are always there,
    and training encodes them where no embeddings are. `masks` keeps what is learned of each image: an alpha channel or
    a file NAME-mask.png beside it. `shard` "i/n" makes the i-th of n parts, on one of n machines.
    `options` are settings of the data (captions, split, square, bucket_step, held_out, max_bad, …). The same call goes
    on where it was stopped. Raises LdmError: bad settings before any work, ResourceError where the disk is full (what
    is done is kept), Interrupted, DataError where too many images are unusable.
    """
    from ldm.config import build

    require(embeddings in ("auto", "yes", "no"), f"must be auto, yes or no, got {embeddings!r}", "embeddings")
    require(dtype in ("bf16", "fp32"), f"must be bf16 or fp32, got {dtype!r}", "dtype")
    require(batch_size >= 1, f"must be at least 1, got {batch_size}", "batch_size")
    require(text is not None or embeddings != "yes", "needs a text encoder: give text too", "embeddings")
    settings = build(FinetuneData, {"folder": str(data), "resolution": resolution, "masks": masks, **options}, "data")
    fixed = settings.transform == TransformConfig()
    require(
        fixed, "crops and flips are drawn anew in each epoch, and a prepared set has one view of each image", "crop"
    )
    part, place = Shard.read(shard), Path(out)
    files.require_place(place)
    source = open_source(settings.folder, **settings.reading)
    source.require(settings.max_bad, settings.allow_empty_captions)
    vae_part = find_vae(vae, vae_subfolder, scale=vae_scaling_factor)
    texts = None if text is None else find_text(text, text_subfolder, text_2, text_2_subfolder)
    fits = settings.buckets.step % vae_part.factor == 0
    require(fits, f"{settings.buckets.step} is not a multiple of the autoencoder's {vae_part.factor}", "bucket_step")
    asked = CacheSettings(settings, vae_part, texts, embeddings, dtype, part, batch_size, pick_device(device))
    return _Preparing(asked, source, place).run()


class _Preparing:
    """One part being made."""

    def __init__(self, settings: CacheSettings, source: Source, out: Path):
        s = self.settings = settings
        self.source, self.out, self.kind = source, out, getattr(torch, DTYPES[s.dtype])
        self.positions = range(s.shard.number - 1, len(source), s.shard.of)
        self.failed: list[LdmError] = []
        vae = s.vae.load()
        vae = vae.to(torch.bfloat16) if fast_bf16(s.device) else vae
        text = s.text.load() if s.text is not None else _NoText()
        self.encoders = Encoders(vae, text, ("", ""), s.device)

    def run(self) -> Path:
        s, kept = self.settings, 0
        embedded = self._announce()
        self._write_info(embedded)
        with PartWriter(self.out / f"part-{s.shard.number}-of-{s.shard.of}") as writer, StopRequest() as stop:
            missing = [position for position in self.positions if position not in writer.done]
            kept = len(self.positions) - len(missing)
            try:
                self._make(missing, writer, embedded, stop)
            except BaseException:
                with suppress(LdmError):  # only the first error is reported
                    writer.flush()
                raise
            writer.flush()
        made = len(missing) - len(self.failed)
        say(
            f"cache: {kept} images found, {made} made, {len(self.failed)} left out; "
            f"{format_bytes(writer.written)} written"
        )
        return self.out

    def _announce(self) -> bool:
        """Say what will be made, and the disk it takes; whether the captions are embedded."""
        s, count = self.settings, len(self.positions)
        tried = [self.source[p] for p in islice(self.positions, TRIED)]
        images = count * sum(map(_file_size, tried)) // max(1, len(tried))
        side, width = s.data.resolution // s.vae.factor, self.kind.itemsize
        latents = 2 * count * s.vae.latent_channels * side * side * width
        lines, needed, embedded = [f"latents take {format_bytes(latents)}"], latents, False
        if s.text is not None and s.embeddings != "no":
            captions = count * sum(max(1, len(sample.captions)) for sample in tried) / max(1, len(tried))
            texts = int(captions * sum(tensor.nbytes for tensor in self._embed([""]).values()))
            embedded = s.embeddings == "yes" or texts <= images
            needed += texts if embedded else 0
            told = f"embeddings of the captions take {format_bytes(texts)}"
            without = f"captions are kept as text: their embeddings would take {format_bytes(texts)}"
            without += f", the images {format_bytes(images)}"
            lines.append(told if embedded else without)
        if self.source.repeated:
            lines.insert(0, f"{sum(self.source[p].repeats for p in self.positions)} samples an epoch, repeats counted")
        free = files.free_space(self.out)
        say(
            f"cache: {count} images at {s.data.resolution} px; {'; '.join(lines)}; "
            f"{format_bytes(free)} are free in {self.out}"
        )
        there = sum(path.stat().st_size for path in self.out.glob("part-*/*.safetensors"))
        files.require_space(self.out, max(0, needed - there))
        return embedded

    def _write_info(self, embedded: bool) -> None:
        """prepared.json, or ConfigError where the folder was made with something else."""
        s = self.settings
        info: dict[str, Any] = {"format": REPEATED if self.source.repeated else FORMAT}
        info |= {"source": s.data.folder, "images": len(self.source)}
        info |= {"resolution": s.data.resolution, "step": s.data.buckets.step, "square": s.data.square}
        info |= {"vae": s.vae.place.name, "vae_hash": s.vae.fingerprint, "factor": s.vae.factor, "dtype": s.dtype}
        info |= {"channels": s.vae.latent_channels, "parts": s.shard.of, "embeddings": embedded}
        info["masks"] = s.data.masks
        info["text_hash"] = s.text.fingerprints if s.text is not None and embedded else None
        if (self.out / PREPARED).is_file():
            before = {"masks": False, **read_info(self.out)}  # older ones do not say
            for name, value in info.items():
                if before.get(name) != value:
                    what = f"was made with {name} {before.get(name)}, not {value}"
                    if name == "format":
                        what = f"was made with{'out' * (value == REPEATED)} the repeats of kohya's folders"
                    raise ConfigError(what, where=self.out, hint="choose a new folder, or the same settings")
        elif self.out.is_dir() and any(path for path in self.out.iterdir() if not path.name.startswith(".")):
            raise ConfigError("holds something else than a cache", where=self.out, hint="choose a new folder")
        else:
            files.atomic_write(self.out / PREPARED, json.dumps(info, indent=1) + "\n")

    def _make(self, missing: Sequence[int], writer: PartWriter, embedded: bool, stop: StopRequest) -> None:
        waiting: dict[Size, list[Loaded]] = {}
        with torch.no_grad(), progress(total=len(missing), desc="preparing", unit="image") as bar:
            for loaded in self._loaded(missing):
                bar.update()
                if loaded is not None:
                    group = waiting.setdefault(loaded.view.size, [])
                    group.append(loaded)
                    if len(group) == self.settings.batch_size:
                        self._encode(waiting.pop(loaded.view.size), writer, embedded)
                if stop.signal:
                    what = "stopped while the cache was made; what is done is kept"
                    raise Interrupted(stop.signal, what, where=self.out, hint="run the same again to go on")
            for group in waiting.values():
                self._encode(group, writer, embedded)

    def _loaded(self, positions: Sequence[int]) -> Iterator[Loaded | None]:
        """The images in order, read ahead by threads; None for one that cannot be used."""
        with ThreadPoolExecutor(max(1, self.settings.data.workers), "images") as threads:
            for start in range(0, len(positions), AHEAD):
                for one in threads.map(self._read, positions[start : start + AHEAD]):
                    if isinstance(one, LdmError):
                        self._lose(one)
                    yield None if isinstance(one, LdmError) else one

    def _read(self, position: int) -> Loaded | LdmError:
        data = self.settings.data
        try:
            sample = self.source[position]
            with sample.open() as file:
                content = file.read(MAX_FILE + 1)
            header = read_header(io.BytesIO(content), sample.where)
            size = Size(header.height, header.width)
            bucket = bucket_of(size, data.buckets)
            image = read_image(io.BytesIO(content), sample.where, at_least=min(resized(size, bucket)))
            (view,) = fixed_views(size, bucket, data.transform)
            mask = read_mask(content, sample, view, self.settings.vae.factor)[0] if data.masks else None
            digest = hashlib.sha256(content).hexdigest()
            return Loaded(position, sample, digest, view, pixels(image, view), mask)
        except DataError as error:
            return error

    def _lose(self, error: LdmError) -> None:
        """Count an image that cannot be used. Raises DataError where they are too many."""
        warn(f"{error}; left out")
        self.failed.append(error)
        allowed = self.settings.data.max_bad
        if len(self.failed) > (allowed * len(self.positions) if allowed < 1 else allowed):
            kinds = "; ".join(f"{what} {n}" for what, n in Counter(e.what for e in self.failed).most_common())
            what = f"{len(self.failed)} of {len(self.positions)} images cannot be used ({kinds})"
            raise DataError(what, where=self.source.path, hint="mend them or raise max_bad")

    def _encode(self, group: Sequence[Loaded], writer: PartWriter, embedded: bool) -> None:
        try:
            mean, std = self.encoders.encode(to_float(torch.stack([one.pixels for one in group])))
        except NumericsError as error:
            if len(group) > 1:
                for one in group:
                    self._encode([one], writer, embedded)
                return
            return self._lose(DataError(error.what, where=group[0].sample.where))
        share = min(self.settings.data.held_out, MOST / len(self.source))
        for row, one in enumerate(group):
            held = draw("held out", one.digest) < share
            writer.put(
                Row(
                    one.position,
                    one.sample.id,
                    one.sample.captions,
                    one.view.time_ids,
                    mean[row].to(self.kind),
                    std[row].to(self.kind),
                    self._embed(one.sample.captions or [""]) if embedded else {},
                    held,
                    one.mask,
                    1 if held else one.sample.repeats,
                )
            )

    def _embed(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        found = self.encoders.embed(list(captions), together=all(captions))
        return {name: t.to(self.kind) if t.is_floating_point() else t for name, t in found.items()}


class _NoText:
    """Stands where no text encoder was asked for."""

    dtype = None

    def to(self, _device: object) -> _NoText:
        return self


def _file_size(sample: Sample) -> int:
    try:
        with sample.open() as file:
            return file.seek(0, 2)
    except DataError:
        return 0
