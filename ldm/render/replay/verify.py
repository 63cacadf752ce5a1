"""Images drawn again from their own metadata and compared: the same bytes or pixels, near, or different, and why.

The same model, LoRAs, dtype, threads, torch and kind of CPU give the same bits; whatever else an image was drawn with
is named as a cause. Nothing is written.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

import ldm
from ldm import console
from ldm.errors import ConfigError, LdmError
from ldm.files import sha256
from ldm.images import SUFFIXES, Metadata, encode, read_metadata
from ldm.pipeline.sources import DIGESTS, digests_of
from ldm.render.output.lines import DONE, is_inside, last_lines
from ldm.render.replay.replay import Replay, differences, fitted_to, keywords, read_replays

BYTES, PIXELS, NEAR, DIFFERENT = "same bytes", "same pixels", "near", "different"
NOT_DRAWN, NO_METADATA = "not drawn", "no metadata"
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
MOST_INPUTS = 2000  # images of a folder that are looked through for the input of image-to-image
# Releases that draw some images otherwise than those before: version -> what.
REVISIONS = {
    "0.2.0": "DoRA weights other than 1, emoji in prompts, transparent masks, initial images in other colours than sRGB"
    ", bf16 on a CPU, images without guidance beside guided ones by cfg_zero or a step cache"
}


@dataclass(frozen=True)
class Verdict:
    """What became of one image."""

    path: str
    result: str  # one of the words above
    largest: int | None = None  # difference of a channel, of 255; None where nothing was compared
    mean: float | None = None
    causes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return self.result in (BYTES, PIXELS, NEAR)

    def as_text(self) -> str:
        near = {NEAR: f"within {self.largest} of 255", DIFFERENT: f"different, by up to {self.largest} of 255"}
        words = near.get(self.result, self.result) if self.largest is not None else self.result
        mean = f" (mean {self.mean:.2g})" if self.mean else ""
        return "\n  ".join([f"{self.path}: {words}{mean}", *self.causes])


@dataclass(frozen=True)
class Verified:
    """The verdicts of a call. `exit_code` is 3 where an image differs, else 2 where one has no metadata, else 0."""

    verdicts: tuple[Verdict, ...]

    @property
    def exit_code(self) -> int:
        if any(not one.good and one.result != NO_METADATA for one in self.verdicts):
            return 3
        return 2 if any(one.result == NO_METADATA for one in self.verdicts) else 0

    def counts(self) -> dict[str, int]:
        """Result -> number of images."""
        results = [one.result for one in self.verdicts]
        return {result: results.count(result) for result in dict.fromkeys(results)}


def verify(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    tolerance: int = 0,
    *,
    model: Any = None,
    vae: str | os.PathLike | None = None,
    lora_dir: str | os.PathLike | None = None,
    device: str | None = None,
    prediction_type: str | None = None,
) -> Verified:
    """Draw images again from their own metadata, and compare.

    sources    images (PNG, JPEG, WebP), folders of them, or manifest.jsonl of rendered folders
    tolerance  0 to 255: how far a channel may be off
    model, vae, lora_dir   where the metadata's own cannot be found: a model of another place, a folder with its LoRAs
    device     another than the image was drawn on
    prediction_type  what images were drawn with whose metadata does not tell it (before 0.2.0)

    Raises ConfigError for a source that does not exist or holds no images. An image that cannot be drawn again is a
    verdict with its cause.
    """
    options = {"model": model, "vae": vae, "lora_dir": lora_dir, "device": device, "prediction_type": prediction_type}
    return Verified(tuple(verdicts(sources, tolerance, **options)))


def verdicts(
    sources: str | os.PathLike | Sequence[str | os.PathLike], tolerance: int = 0, **given: Any
) -> Iterator[Verdict]:
    """As `verify`, each as soon as it is known."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int) or not 0 <= tolerance <= 255:
        raise ConfigError(f"expected a whole number from 0 to 255, got {tolerance!r:.80}", where="tolerance")
    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    images = [image for source in listed for image in images_of(Path(source))]
    options = {name: value for name, value in given.items() if value is not None}
    return (_verdict(path, line, tolerance, options) for path, line in images)


def images_of(source: Path) -> list[tuple[Path, Mapping[str, Any] | None]]:
    """(image, its line in the manifest or None) of everything in a source. Raises ConfigError."""
    if not source.exists():
        raise ConfigError("no such image, folder or manifest", where=source)
    if source.is_file() and source.suffix.lower() != ".jsonl":
        return [(source, None)]
    folder = source if source.is_dir() else source.parent
    lines = list(last_lines(source)) if source.is_file() or any(folder.glob("manifest*.jsonl")) else []
    found = [(folder / line["path"], line) for line in lines if line["status"] == DONE and is_inside(line.get("path"))]
    if source.is_dir():
        kinds = [suffix for suffix, kind in SUFFIXES.items() if kind in FORMATS]
        images = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in kinds]
        listed = {path for path, _ in found}
        others = [path for path in images if path not in listed]
        if found and others:
            console.say(f"{source}: {len(others)} images are not in its manifest, so not compared: {others[0].name}, …")
        found = found or [(path, None) for path in images]
    if not found:
        raise ConfigError("holds no images", where=source, hint="give images, a folder of them, or a manifest.jsonl")
    return found


def _verdict(path: Path, line: Mapping[str, Any] | None, tolerance: int, options: dict[str, Any]) -> Verdict:
    """The verdict on one image: every failure is one."""
    try:
        if line is not None and not path.is_file():
            return Verdict(str(path), NOT_DRAWN, causes=("the file that the manifest names is not there",))
        metadata = read_metadata(path)
        if not metadata.ldm and not metadata.parameters.strip() and not metadata.others:
            return Verdict(str(path), NO_METADATA)
        replay = _replay(path, metadata)
        if replay.entry.error is not None:
            kind = NO_METADATA if "holds nothing of how" in str(replay.entry.error) else NOT_DRAWN
            return Verdict(str(path), kind, causes=(replay.entry.error.what,))
        if replay.entry.settings.get("seed") is None:
            return Verdict(str(path), NOT_DRAWN, causes=("its metadata holds no seed", *replay.notes))
        if line is not None:  # a manifest knows where the model is, an image its name alone
            settings = line.get("settings") or {}
            options = {**{name: settings[name] for name in ("model", "vae") if name in settings}, **options}
        if missing := _missing_model(replay, options):
            return Verdict(str(path), NOT_DRAWN, causes=(missing,))
        replay = fitted_to(replay, options.get("model", "default"))
        image, now = _drawn(replay, options)
    except LdmError as error:
        return Verdict(str(path), NOT_DRAWN, causes=(str(error),))
    verdict = _compared(path, metadata, image, tolerance)
    if verdict.result in (BYTES, PIXELS):
        return verdict
    causes = [*differences(replay.source, now), *replay.notes, *_of_version(replay.source)]
    if line is not None and line.get("sha256") not in (None, sha256(path)):
        causes.insert(0, "the file was changed after it was written: its sha256 is not the manifest's")
    unknown = "its settings, model and machine are those of now: the file was changed, or drawn by a changed program"
    return replace(verdict, causes=tuple(dict.fromkeys(causes)) or (unknown,))


def _replay(path: Path, metadata: Metadata) -> Replay:
    """The replay of an image, with its inputs found by their pixels where they are not where they were."""
    changes = []
    for word, digest in DIGESTS.items():
        if metadata.ldm.get(digest):
            found = _input_at(metadata.ldm.get(word), metadata.ldm[digest], path.parent)
            if found is None:
                what = f"was drawn from an image that is not at hand ({word} of pixels {metadata.ldm[digest][:12]})"
                name, many = metadata.ldm.get(word), len(_beside(path.parent)) > MOST_INPUTS
                under = f"as {Path(name).name}" if many and isinstance(name, str) else "under any name"
                raise ConfigError(what, where=path, hint=f"put it beside the image, {under}")
            changes.append(f"{word}={found}")
    (replay,) = read_replays([path], changes)
    return replay


def _input_at(recorded: Any, digest: str, folder: Path) -> Path | None:
    """The image with these pixels: where the metadata has it, else in the folder under any name."""
    places = [Path(recorded), folder / Path(recorded).name] if isinstance(recorded, str) else []
    for path in (*places, *_beside(folder)[:MOST_INPUTS]):
        with contextlib.suppress(LdmError, OSError):
            if path.is_file() and digest in _digests(path, path.stat().st_mtime_ns):
                return path
    return None


def _beside(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]


@functools.lru_cache(maxsize=2 * MOST_INPUTS)
def _digests(path: Path, _changed: int) -> frozenset[str]:
    """Of an image's pixels; a folder's images are read once, however many others were drawn from some of them."""
    return frozenset(digests_of(path))


def _missing_model(replay: Replay, options: Mapping[str, Any]) -> str | None:
    """What to say where the image's model is only known by name; nothing else is drawn in its place."""
    named = replay.source.get("model")
    if "model" in options or "model" in replay.entry.settings or named == "default":
        return None
    hashed = f", hash {str(replay.source['model_hash'])[:10]}" if replay.source.get("model_hash") else ""
    return f"the model {named!r:.80}{hashed} is not here; name it by --model" if named else "no model is named: --model"


def _drawn(replay: Replay, options: Mapping[str, Any]) -> tuple[Image.Image, Mapping[str, Any]]:
    """(the image drawn again, its metadata), on as many threads as it was."""
    from ldm.pipeline import Pipeline

    own, call = keywords(replay)
    if not isinstance(options.get("model", ""), (str, os.PathLike)):
        own.pop("prediction_type", None)  # the schedule of a loaded model is its own
    own |= {"device": "cpu"} if str(replay.source.get("device", "")).startswith("cpu") else {}
    threads = replay.source.get("threads")
    with _threads(threads if isinstance(threads, int) else 0), console.hushed():
        images = Pipeline(**{**own, **options}).generate(**call)
    return images[0], images.metadata[0]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(count, 1024) if count > 0 else before)
        yield
    finally:
        torch.set_num_threads(before)


def _compared(path: Path, metadata: Metadata, image: Image.Image, tolerance: int) -> Verdict:
    """Compare the file with the image as it would be written, in the file's format and with the file's metadata."""
    with Image.open(path) as opened:
        kind, old = FORMATS.get(opened.format or ""), opened.convert("RGB")
    if kind is None:
        raise ConfigError("is neither PNG, JPEG nor WebP", where=path)
    data = encode(image, kind, replace(metadata, others={}))
    if data == path.read_bytes():
        return Verdict(str(path), BYTES, 0, 0.0)
    if kind != "png":
        image = _decoded(data)
    if image.size != old.size:
        sizes = f"it is {old.width}x{old.height}, drawn again {image.width}x{image.height}"
        return Verdict(str(path), DIFFERENT, causes=(sizes,))
    apart = numpy.abs(numpy.asarray(image, int) - numpy.asarray(old, int))
    largest, mean = int(apart.max()), float(apart.mean())
    result = PIXELS if largest == 0 else NEAR if largest <= tolerance else DIFFERENT
    return Verdict(str(path), result, largest, mean)


def _decoded(data: bytes) -> Image.Image:
    import io

    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _of_version(source: Mapping[str, Any]) -> list[str]:
    """What later releases of this package draw otherwise."""
    versions = source.get("versions")
    old = str(versions.get("ldm", "")) if isinstance(versions, Mapping) else ""
    if not old or old == ldm.__version__:
        return []
    lines = [f"drawn by ldm {old}, this is {ldm.__version__}"]
    return lines + [f"ldm {new} draws otherwise: {what}" for new, what in REVISIONS.items() if _after(new, old)]


def _after(new: str, old: str) -> bool:
    try:
        return tuple(map(int, new.split("."))) > tuple(map(int, old.split(".")[:3]))
    except ValueError:
        return False
