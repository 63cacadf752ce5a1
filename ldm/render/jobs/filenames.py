"""File names that stay in their folder on every system, made from whatever a line calls its image."""

from __future__ import annotations

import re
import unicodedata

from ldm.errors import ConfigError
from ldm.images import file_format

MAX_BYTES = 120  # of a name in UTF-8; what is put behind it keeps the whole below 180
_DEVICES = re.compile(r"(?:con|prn|aux|nul|clock\$|conin\$|conout\$|(?:com|lpt)[0-9¹²³])[ .]*(?:\.|$)", re.IGNORECASE)


def safe_name(name: str) -> str:
    """`name` without separators, invisible characters, leading dots and dashes, and the names of Windows' devices.

    At most 120 bytes, NFC, without the suffix of an image file; "" where nothing is left.
    """
    text = unicodedata.normalize("NFC", name[: 8 * MAX_BYTES])
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = re.sub(r'[/\\:*?"<>|\s]+', "-", text.strip())
    text = _without_suffix(text)
    text = re.sub(r"\.{2,}", ".", text).lstrip(".- ~")
    text = text.encode("utf-8")[:MAX_BYTES].decode("utf-8", "ignore").rstrip(". -")
    return f"_{text}" if _DEVICES.match(text) else text


def _without_suffix(text: str) -> str:
    stem, dot, suffix = text.rpartition(".")
    try:
        return stem if dot and file_format(suffix) else text
    except ConfigError:
        return text


def same_name(name: str) -> bytes:
    """What two names have in common that some file system takes for one: case and ways of writing a letter."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).encode("utf-8")
