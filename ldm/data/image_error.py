"""The error of files whose pixels cannot be read."""

from __future__ import annotations

from ldm.errors import DataError, one_line


class ImageError(DataError):
    """A file whose pixels cannot be read; `reason` is the same for all that fail in the same way, for counting."""

    def __init__(self, reason: str, detail: str = "", *, where: object = None, hint: str | None = None):
        self.reason, self.detail = reason, one_line(detail)
        super().__init__(f"{reason} ({self.detail})" if detail else reason, where=where, hint=hint)
