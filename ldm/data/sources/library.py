"""Sets of the `datasets` library: a folder that save_to_disk wrote, or a repository on the hub."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ldm.console import progress
from ldm.data.images import MAX_FILE, ImageError
from ldm.data.sources.rows import caption_column, rivals
from ldm.data.sources.source import Counts, Sample, Source, captions_of
from ldm.data.sources.splits import ALL, choose_split
from ldm.data.sources.tables import HINT, choose_image_column, image_bytes, rival_images
from ldm.data.sources.walk import open_file
from ldm.errors import DataError, one_line

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
FIRST = 100  # samples of a stream, of which at least one must have a caption


def is_hub_id(data: str) -> bool:
    """Whether this can only be a repository: `owner/name` or `owner/name@revision`, and no local path."""
    return bool(ID.fullmatch(data)) and not Path(data).exists() and not Path(data).parent.exists()


class LibrarySource(Source):
    """Rows of a `datasets.Dataset`, which lies on the disk; a row is read when it is indexed."""

    def __init__(self, path: object, layout: str, counts: Counts, dataset, columns: tuple[str, str], rows: list[int]):
        super().__init__(path, layout, counts, len(rows))
        self.dataset, self.rows = dataset, rows
        self.images, self.caption = columns
        self.texts = dataset.select_columns([self.caption]) if self.caption else None

    def _sample(self, position: int) -> Sample:
        row = self.rows[position]
        texts = captions_of(_text(self.texts[row][self.caption]))[0] if self.texts is not None else ()
        where = f"{self.path}#{row}"
        return Sample(f"#{row}", texts, 1, where, partial(_row_bytes, self.dataset, self.images, row, where))


class StreamSource(Source):
    """A set on the hub that is read as a stream, in its order, and never stored. Its counts grow while it is read."""

    random_access = False

    def __init__(self, path: object, layout: str, dataset, columns: tuple[str, str]):
        super().__init__(path, layout, Counts(), 0)
        self.dataset, (self.images, self.caption) = dataset, columns

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def __getitem__(self, index: int) -> Sample:
        return next(islice(iter(self), index, None))

    def __iter__(self) -> Iterator[Sample]:
        self.counts = Counts()
        rows = enumerate(self.dataset)
        while (item := _next(rows, self.path)) is not None:
            number, row = item
            where = f"{self.path}#{number}"
            self.counts.found += 1
            data, reason = _bytes(row.get(self.images), self.path)
            texts, fault = captions_of(_text(row.get(self.caption)))
            if reason or fault:
                self.counts.skip(where, reason or fault)
                continue
            self.counts.use(f"#{number}", texts)
            yield Sample(f"#{number}", texts, 1, where, partial(io.BytesIO, data))

    def validate(self, check=Sample.header, desc: str = "headers"):
        """Like `Source.validate`, but bad images are not remembered: the next pass meets them again."""
        for sample in progress(self, desc=desc, unit="image"):
            try:
                yield sample, check(sample)
            except DataError as error:
                self._drop(sample, error)


def _next(rows, path: object):
    try:
        return next(rows, None)
    except Exception as error:  # the library raises many types, for the network and for damaged files
        raise DataError(f"cannot be read any further ({_line(error)})", where=path) from None


def _text(value: Any) -> Any:
    """A caption field as it is, or the caption in the JSON of a webdataset."""
    if isinstance(value, dict):
        column = caption_column(list(value))
        return value[column] if column else None
    return value


def _row_bytes(dataset, column: str, row: int, where: str) -> BinaryIO:
    try:
        value = dataset[row][column]
    except Exception as error:  # a damaged or missing arrow file: the library raises many types
        raise ImageError("cannot be read from the set", _line(error), where=where) from None
    data, reason = _bytes(value, where)
    if reason:
        raise ImageError(reason, where=where)
    return io.BytesIO(data)


def _bytes(value: Any, where: str) -> tuple[bytes, str]:
    """As `image_bytes`; paths in the library's own caches and in the repository that is read are followed."""
    from datasets import config
    from huggingface_hub import constants

    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
    if not isinstance(path, str):
        return image_bytes(value)
    try:
        if path.startswith(f"hf://datasets/{re.split('[@#]', where)[0]}@"):
            from huggingface_hub import HfFileSystem

            with HfFileSystem().open(path) as file:
                return image_bytes(file.read(MAX_FILE + 1))
        caches = [os.path.realpath(cache) + os.sep for cache in (config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]
        if os.path.realpath(path).startswith(tuple(caches)):
            with open_file(Path(path)) as file:
                return image_bytes(file.read(MAX_FILE + 1))
    except OSError as error:
        raise ImageError("cannot be opened", error.strerror or str(error), where=where) from None
    return image_bytes(value)


def open_saved(path: Path, split: str | None) -> LibrarySource:
    """The source of a folder that save_to_disk wrote. Raises DataError where the library cannot read it."""
    import datasets

    try:
        with _no_bars():
            dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many types
        raise DataError(f"cannot be read as a saved set ({_line(error)})", where=path) from None
    return _of(path, "datasets folder", dataset, split)


def open_hub(name: str, split: str | None, stream: bool) -> Source:
    """The source of a repository: downloaded into the library's cache, or read as a stream.

    Only data is read: no code of a repository is ever run. Raises DataError where it cannot be read.
    """
    import datasets

    repo, _, revision = name.partition("@")
    try:
        with _no_bars():
            dataset = datasets.load_dataset(repo, revision=revision or None, streaming=stream)
    except Exception as error:  # the library raises many types: no network, no such repository, gated, a full disk
        raise DataError(*_hub_failure(error, repo), where=name, hint=_todo(error, repo)) from None
    return _of(name, "hub set", dataset, split, stream)


def _hub_failure(error: Exception, repo: str) -> tuple[str]:
    from datasets import config

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "offline" if offline else _line(error)
    return (
        f"no such folder here, and the set {repo} is neither in {config.HF_DATASETS_CACHE} nor could be read from"
        f" the hub ({reason})",
    )


def _todo(error: Exception, repo: str) -> str:
    names = {kind.__name__ for kind in type(error).__mro__}
    if "Config name is missing" in str(error):  # a repository of several sets
        return f"run `hf download {repo} --repo-type dataset` and give the folder of one of its sets"
    if "DatasetNotFoundError" in names:
        return "check the name, and `hf auth login` if the set is private"
    return f"connect and try again, or run `hf download {repo} --repo-type dataset` and give its folder"


def _line(error: Exception) -> str:
    text = one_line(str(error))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _no_bars:
    """Hides the library's progress bars where ours are hidden."""

    def __enter__(self) -> None:
        import datasets

        self.quiet = progress(total=0).disable and not datasets.are_progress_bars_disabled()
        if self.quiet:
            datasets.disable_progress_bars()

    def __exit__(self, *_exc) -> None:
        import datasets

        if self.quiet:
            datasets.enable_progress_bars()


def _of(path: object, kind: str, dataset, split: str | None, stream: bool = False) -> Source:
    import datasets

    doubt = None
    if isinstance(dataset, dict):
        name, dataset, doubt = _split_of(path, dataset, split, stream)
        kind = f"{kind}, split {name}"
    features = dataset.features or {}
    images = _image_column(features)
    listed = ", ".join(map(repr, features)) or "not known"
    if images is None:
        raise DataError(f"has no column of images: the columns are {listed}", where=path, hint=HINT)
    if stream:
        dataset = dataset.decode(False)
    elif isinstance(features[images], datasets.Image):
        dataset = dataset.cast_column(images, datasets.Image(decode=False))
    caption = caption_column(list(features)) or next((name for name in ("txt", "json") if name in features), None)
    columns = (images, caption)
    layout = f"{kind}, images in {images!r}, captions in {caption!r}" if caption else f"{kind}, without captions"
    nothing = DataError(f"holds no captions: the columns are {listed}", where=path, hint="name one of them 'text'")
    if stream:
        source = StreamSource(path, f"{layout}, read as a stream", dataset, columns)
    else:
        source = LibrarySource(path, layout, *_counted(path, dataset, caption, columns))
        source.counts.notes += rivals(list(features)) + rival_images(_image_columns(features), images)
    source.no_captions, source.doubt = nothing, doubt
    if stream and not any(sample.captions for sample in islice(source, FIRST)):
        raise nothing
    return source


def _split_of(path: object, parts: dict, split: str | None, stream: bool) -> tuple[str, Any, DataError | None]:
    """(name, dataset, doubt) of the split that is read; of a stream it is train where its sizes are not told."""
    import datasets

    if len(parts) == 1 and split in (None, "train"):
        return (*next(iter(parts.items())), None)
    told = {name: _told_size(part, name) if stream else len(part) for name, part in parts.items()}
    unknown = stream and not all(told.values())
    sizes: Counter[str | None] = Counter({name: size or 1 for name, size in told.items()})
    choice = choose_split(sizes, (split or "train") if unknown else split, path)
    named = f"{choice.split or ALL} of {', '.join(parts)}"
    if choice.split is not None:
        return named, parts[choice.split], choice.doubt
    return named, datasets.concatenate_datasets(list(parts.values())), choice.doubt


def _told_size(part, name: str) -> int:
    """The rows of a stream's split as its repository tells them; 0 where it does not."""
    splits = getattr(getattr(part, "info", None), "splits", None) or {}
    return getattr(splits.get(name), "num_examples", 0) or 0


def _image_column(features) -> str | None:
    """The column of images: see `choose_image_column`."""
    kinds = dict(features)
    plain = [name for name, kind in kinds.items() if getattr(kind, "dtype", "") in ("binary", "large_binary")]
    return choose_image_column(_image_columns(features), plain)


def _image_columns(features) -> list[str]:
    """The columns of images or of {"bytes", "path"}."""
    import datasets

    kinds = dict(features).items()
    return [n for n, kind in kinds if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)]


def _counted(path: object, dataset, caption: str | None, columns: tuple) -> tuple[Counts, Any, tuple, list[int]]:
    counts, rows = Counts(found=len(dataset)), []
    texts = dataset.select_columns([caption]) if caption else None
    for row in progress(range(len(dataset)), desc="captions", unit="row"):
        value = _text(texts[row][caption]) if texts is not None else None
        captions, fault = captions_of(value)
        if fault:
            counts.skip(f"{path}#{row}", fault)
            continue
        counts.use(f"#{row}", captions, has_caption=value is not None)
        rows.append(row)
    return counts, dataset, columns, rows
