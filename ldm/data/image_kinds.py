"""What a file is that no decoder knows, by its first bytes."""

from __future__ import annotations

UNREAD = (  # (offset, first bytes, name) of formats that are common in folders of images but not read
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "video"),
    (0, b"PK\3\4", "zip"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"version https://git-lfs", "git-lfs pointer"),
)


def kind_of(start: bytes) -> tuple[str, str]:
    """(reason, detail) for a file that no decoder knows, by its first bytes."""
    for offset, magic, name in UNREAD:
        if start.startswith(magic, offset):
            return "is of a kind that is not read", name
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head", b"<body")):
        return "is no image", "SVG" if b"<svg" in text else "a page of HTML or XML"
    if start.isascii() and not any(byte < 9 for byte in start):
        return "is no image", "text"
    return "is no image", "the first bytes are of no known format, or damaged"
