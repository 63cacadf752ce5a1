"""What generate gives back: images that know their seeds and settings, save themselves and show in a notebook."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError, ResourceError
from ldm.file_names import slug, unused_path
from ldm.files import atomic_write, require_writable
from ldm.images import Metadata, encode, file_format
from ldm.images import grid as make_grid
from ldm.pipeline.metadata import parameters

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Target:
    """Where images go: into `folder` under names made from their prompts, or to `file` and numbered names beside."""

    folder: Path
    file: Path | None
    format: str  # png, jpg or webp

    @classmethod
    def of(cls, output: str | os.PathLike | None = None, format: str | None = None) -> Target:
        """From what the user wrote: a file, a folder (existing, without suffix, or ending in /), or nothing. Raises
        ConfigError for a suffix that is no image format or contradicts `format`."""
        chosen = file_format(format) if format else None
        text = "." if output is None else os.fspath(output)
        if not text or "\0" in text:
            raise ConfigError("the name holds a NUL character" if text else "the name is empty", where="output")
        path = Path(text)
        if text.endswith(os.sep) or path.is_dir() or not path.suffix:
            return cls(path, None, chosen or "png")
        try:
            own = file_format(path.suffix)
        except ConfigError as error:
            hint = "end the name in .png, .jpg or .webp, or a folder in /"
            raise ConfigError(error.what, where=path, hint=hint) from None
        if chosen and chosen != own:
            raise ConfigError(f"the name ends in {path.suffix}, the format is {chosen}", where=path)
        return cls(path.parent, path, own)

    def check(self) -> Target:
        """Raise ConfigError unless files can be created there; for asking before work begins."""
        if self.file and self.file.exists() and not self.file.is_file():
            raise ConfigError("exists and is no ordinary file", where=self.file)
        if self.file and len(os.fsencode(self.file.name)) > 200:
            raise ConfigError("the file name is longer than 200 bytes", where="output")
        try:
            require_writable(self.folder)
        except (ResourceError, OSError) as error:
            raise self._refusal(error) from None
        return self

    def _refusal(self, error: ResourceError | OSError) -> ConfigError:
        if isinstance(error, ResourceError):
            return ConfigError(error.what, where=error.where, hint=error.hint or "choose another folder")
        return ConfigError(str(error.strerror or error), where=self.folder, hint="choose another folder")

    def write(self, data: bytes, prompt: str, first: bool) -> Path:
        """Write one image, never over a file that was not named."""
        return atomic_write(self.file, data) if self.file and first else self._write_numbered(data, prompt)

    def _write_numbered(self, data: bytes, prompt: str) -> Path:
        stem = self.file.stem if self.file else slug(prompt)
        suffix = self.file.suffix if self.file else f".{self.format}"
        while True:
            try:
                return atomic_write(unused_path(self.folder, stem, suffix), data, overwrite=False)
            except FileExistsError:  # another process took the name in between
                continue


class Images(Sequence):
    """PIL images, prompt by prompt, with `seeds` and `metadata` (one mapping each).

    Indexing gives an image, slicing gives Images.
    """

    def __init__(self, images: Sequence[Image.Image], metadata: Sequence[dict[str, Any]]):
        self._images = list(images)
        self.metadata = list(metadata)

    @property
    def seeds(self) -> list[int]:
        """The seed of each image: `generate(seed=images.seeds[k])` draws image k of its prompt again."""
        return [one["seed"] for one in self.metadata]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Images(self._images[index], self.metadata[index])
        return self._images[index]

    def __repr__(self) -> str:
        sizes = sorted({f"{image.width}x{image.height}" for image in self._images})
        seeds = ", ".join(map(str, self.seeds[:8])) + " …" * (len(self) > 8)
        return f"<{len(self)} images, {', '.join(sizes)}, seeds {seeds}>"

    def grid(self, columns: int | None = None, gap: int = 0) -> Image.Image:
        """All images on one sheet; one row a prompt where there are several of each."""
        prompts = len({one["prompt"] for one in self.metadata})
        if columns is None and prompts > 1 and len(self) % prompts == 0 and len(self) > prompts:
            columns = len(self) // prompts
        return make_grid(self._images, columns, gap)

    def save(
        self, output: str | os.PathLike | None = None, format: str | None = None, metadata: bool = True
    ) -> list[Path]:
        """Write the images and return their paths.

        `output` is a folder (files are named by the prompt: a-cat.png, a-cat-2.png, …, never over an existing one),
        a file (later images are numbered beside it), or None for the current folder. Each file is written whole or
        not at all. Raises ConfigError for a name that cannot be used, ResourceError where the disk is full.
        """
        return list(self.save_each(Target.of(output, format).check(), metadata))

    def save_each(self, target: Target, metadata: bool = True) -> Iterator[Path]:
        """As `save`, giving each path as soon as its file is written."""
        for i, own in enumerate(self.metadata):
            yield target.write(self.encoded(i, target.format, metadata), own["prompt"], first=i == 0)

    def encoded(self, index: int, format: str = "png", metadata: bool = True) -> bytes:
        """The bytes of image `index` as a file, with its metadata inside unless `metadata` is False."""
        own = self.metadata[index]
        inside = Metadata(parameters(own), own) if metadata else None
        return encode(self._images[index], format, inside)

    def _repr_png_(self) -> bytes | None:
        return encode(self.grid(gap=4)) if self._images else None

    def _repr_html_(self) -> str:
        figures = []
        for i, own in enumerate(self.metadata):
            source = base64.b64encode(self.encoded(i)).decode("ascii")
            caption = html.escape(f"{own['prompt'][:200]} · seed {own['seed']}")
            figures.append(
                f'<figure style="display:inline-block;margin:4px"><img src="data:image/png;base64,{source}" '
                f'alt="{caption}"><figcaption style="max-width:20em">{caption}</figcaption></figure>'
            )
        return "".join(figures)
