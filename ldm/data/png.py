"""PNGs that hold more than pixels: texts are left out, and colours and EXIF where they are not sound.

A text or a profile of more than a megabyte, compressed into a few kilobytes, makes Pillow refuse the image.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
LIMITS = {b"eXIf": 1 << 16, b"iCCP": 1 << 20}  # bytes, of the profile also unpacked
SIZES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4}  # bytes of other chunks about colours


def without_texts(file: BinaryIO) -> tuple[BinaryIO, bool, tuple[int, int] | None]:
    """The PNG with only the chunks of its pixels, a sound EXIF and sound chunks about colours; whether it is animated;
    the code points of its colours.

    Nothing is copied.
    """
    pieces, position, animated, size = [(0, 8)], 8, False, file.seek(0, io.SEEK_END)
    codes = None
    other: dict[bytes, tuple[int, int]] = {}
    while position + 8 <= size:
        file.seek(position)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = min(size, position + 12 + length)
        if kind in PIXELS:
            pieces.append((position, end))
        elif kind in LIMITS and length <= LIMITS[kind] and _is_sound(file.read(length + 4), kind):
            other[kind] = (position, end)
        elif SIZES.get(kind) == length and _is_sound(body := file.read(length + 4), kind):
            if kind == b"cICP":
                codes = body[0], body[1]
            else:
                other[kind] = (position, end)
        animated = animated or kind == b"acTL"
        position = end
        if kind == b"IEND":
            break
    return io.BufferedReader(_Pieces(file, [*pieces[:2], *other.values(), *pieces[2:]])), animated, codes


def _is_sound(body: bytes, kind: bytes) -> bool:
    """Whether EXIF, a profile or another chunk is whole, and no larger than its limit where it is packed."""
    if len(body) < 4 or zlib.crc32(kind + body[:-4]) != int.from_bytes(body[-4:], "big"):
        return False
    if kind != b"iCCP":
        return True
    packed = zlib.decompressobj()
    try:
        packed.decompress(body[:-4].partition(b"\0")[2][1:], LIMITS[kind])
    except zlib.error:
        return False
    return packed.eof


class _Pieces(io.RawIOBase):
    """Parts of a file, as (begin, end), that are read as one file."""

    def __init__(self, file: BinaryIO, pieces: list[tuple[int, int]]):
        joined: list[tuple[int, int]] = []
        for begin, end in pieces:
            if joined and joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        self.file, self.position, self.starts, total = file, 0, [], 0
        for begin, end in joined:
            self.starts.append((total, begin, end - begin))
            total += end - begin
        self.total = total

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.total}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer) -> int:
        for start, begin, length in self.starts:
            inside = self.position - start
            if 0 <= inside < length:
                self.file.seek(begin + inside)
                data = self.file.read(min(len(buffer), length - inside))
                buffer[: len(data)] = data
                self.position += len(data)
                return len(data)
        return 0
