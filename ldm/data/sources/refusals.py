"""Why a folder has no captions or no images: what was found in their place, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ldm.data.images import ImageError
from ldm.data.sources.captions import CAPTION_SUFFIXES, MAX_CAPTIONS, parse_captions
from ldm.data.sources.lost import DISGUISED
from ldm.data.sources.rows import HINT, METADATA, near_miss
from ldm.data.sources.source import Counts, Skip
from ldm.data.sources.walk import Listing, open_file
from ldm.errors import DataError
from ldm.images import SUFFIXES

PACKED = (".zip", ".gz", ".tgz", ".7z", ".rar", ".xz", ".zst", ".bz2")
WORDS = (".md", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".npz", ".xmp", ".safetensors", ".pt", ".html", *PACKED)
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")


def no_captions(path: Path, listing: Listing, captions: str, counts: Counts) -> DataError | None:
    """The error for a folder without any caption: it names what was found. None where other reasons say more."""
    if captions == "names" and listing.images:
        hint = "write captions in cat.txt beside cat.png"
        return DataError("no name of a file or folder holds words", where=path, hint=hint)
    if listing.metadata and listing.images:
        if counts.skipped:
            return None
        return DataError("holds no captions", where=listing.root / listing.metadata[0], hint=HINT)
    if not listing.images:
        return None if counts.skipped else _no_images(path, listing)
    if any(skip.reason.startswith(("caption", "its .json")) for skip in counts.skipped):
        return None
    images = len(listing.images)
    if hint := near_miss([PurePosixPath(name).name for name in [*listing.others, *listing.captions]]):
        return DataError(f"has no captions{hint}", where=path, hint=f"captions are read from {', '.join(METADATA)}")
    beside, silent = _beside(listing, listing.images)
    if beside:
        suffix, count = beside.most_common(1)[0]
        what = f"has no captions: {count} images have a file *{suffix} beside them, which is not read"
        return DataError(what, where=path, hint="rename these files to *.txt")
    found = "".join(f", {count} files *{suffix} beside them ({why})" for suffix, (count, why) in silent.items())
    if not found and (files := [name for name in listing.captions if not name.lower().endswith(".json")]):
        what = f"has no captions: none of {len(files)} caption files ({few(files)}) has the name"
        stems = {PurePosixPath(name).stem for name in listing.images}
        if apart := [name for name in files if PurePosixPath(name).stem in stems]:
            what = f"has no captions: {len(apart)} caption files lie in other folders than their images ({few(apart)})"
            return DataError(what, where=path, hint="move each beside its image")
        return DataError(f"{what} of an image", where=path, hint="name the caption of cat.png cat.txt")
    tables = [name for name, suffix in listing.others.items() if suffix in (".csv", ".tsv", ".jsonl")]
    found += f", and {few(tables)}: is it metadata.csv or .jsonl?" if tables else ""
    what = f"has no captions: {images} images, no metadata and no .txt or .caption beside them{found}"
    return DataError(what, where=path, hint="write cat.txt beside cat.png, or take the names with --captions names")


def _no_images(path: Path, listing: Listing) -> DataError:
    kinds = Counter(suffix or "no suffix" for suffix in [*listing.others.values(), *map(_suffix, listing.captions)])
    kinds.update(_suffix(name) for name in listing.metadata)
    found = [f"{count} {kind}" for kind, count in kinds.most_common(8)]
    found += [f"{len(listing.unfollowed)} links that are not followed"] if listing.unfollowed else []
    found += [f"{listing.hidden} hidden"] if listing.hidden else []
    hint = f"they end in {' '.join(SUFFIXES)}"
    if any(kind in PACKED for kind in kinds):
        hint = "unpack it, and give the folder"
    return DataError(f"holds no images ({', '.join(found) or 'nothing'})", where=path, hint=hint)


def few(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def unread_beside(listing: Listing, images: Sequence[str]) -> str:
    """Words about the files beside images without a caption; "" where there are none."""
    beside, silent = _beside(listing, images)
    found = [f"{count} have a file *{end}, which is not read" for end, count in beside.most_common(2)]
    found += [f"{count} a file *{end} ({why})" for end, (count, why) in list(silent.items())[:2]]
    return f"; beside them {', '.join(found)}" if found else ""


def _beside(listing: Listing, images: Iterable[str]) -> tuple[Counter[str], dict[str, tuple[int, str]]]:
    """Files beside images, by the ends of their names, as one of each shows: (captions -> count, others -> why not)."""
    stems: dict[tuple[str, str], list[str]] = {}
    for name in [*listing.others, *listing.captions]:
        path = PurePosixPath(name)
        stems.setdefault((str(path.parent), path.name.split(".")[0]), []).append(name)
    ends: dict[str, list[str]] = {}
    for image in map(PurePosixPath, images):
        for name in stems.get((str(image.parent), image.name.split(".")[0]), ()):
            end = PurePosixPath(name).name.removeprefix(image.stem)
            if end.startswith(".") and end != PurePosixPath(name).name and end not in CAPTION_SUFFIXES[:2]:
                ends.setdefault(end, []).append(name)
    beside: Counter[str] = Counter()
    silent: dict[str, tuple[int, str]] = {}
    for end, names in ends.items():
        read = parse_captions(_first_bytes(listing.root / names[0], MAX_CAPTIONS + 1), _suffix(end) or end)
        if read.texts:
            beside[end] = len(names)
        else:
            why = "no text" if "not UTF-8" in read.fault else read.fault or read.detail or "empty"
            silent[end] = len(names), why
    return beside, silent


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(count)
    except (OSError, ImageError):
        return b""


def disguised(listing: Listing) -> list[Skip]:
    """The images among other files, whose names do not say so: `.jpg_large`, or no suffix at all."""
    found = []
    for name, suffix in listing.others.items():
        if suffix in WORDS:
            continue
        start = _first_bytes(listing.root / name, 16)
        if start.startswith(MAGIC) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
            found.append(Skip(str(listing.root / name), DISGUISED, suffix or "no suffix"))
    for skip in found:
        del listing.others[str(Path(skip.where).relative_to(listing.root))]
    return found
