"""Every failure that a user can cause or meet, as one exception type with a one-line message."""

from __future__ import annotations

from typing import Any


class LdmError(Exception):
    """An expected failure: what went wrong, where, and what to do about it, in one line.

    where  the file, setting or line with the fault; its spaces are kept, because file names may have them
    hint   what the user can do about it (`todo` is the old name)
    `exit_code` is what the command line returns: 2 refused before work began, 4 out of disk or memory,
    5 stopped part-way by a named failure with everything before it saved.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, hint: str | None = None, todo: str | None = None):
        self.what, self.where, self.hint = what, where, hint or todo
        prefix = "" if where is None else " ".join(str(where).splitlines()) + ": "
        super().__init__(prefix + "; ".join(one_line(text) for text in (what, self.hint) if text))

    @property
    def todo(self) -> str | None:
        """The old name of `hint`."""
        return self.hint


class ConfigError(LdmError):
    """A setting that is unknown, of the wrong type, out of range or in contradiction to another."""


class DataError(LdmError):
    """An image, caption, dataset or font that cannot be used."""


class ModelError(LdmError):
    """A model folder or weight file that is missing, damaged, of the wrong kind or not supported."""


class CheckpointError(LdmError):
    """A training checkpoint that is missing, damaged or does not belong to these settings."""


class NumericsError(LdmError):
    """NaN or infinity where a finite number has to be."""

    exit_code = 5


class ResourceError(LdmError):
    """Out of disk, memory or permission."""

    exit_code = 4
    row: int | None = None  # of several images the number of the one that memory has no room for


class ProcessGone(LdmError):
    """Another process of the same run has ended, or hangs; the run can be resumed from what was saved."""

    exit_code = 5


class Interrupted(LdmError):
    """A signal stopped the work after its state was saved; the exit code is 128 + the signal's number."""

    def __init__(self, number: int, what: str, **options: Any):
        super().__init__(what, **options)
        self.exit_code = 128 + number


def one_line(text: str) -> str:
    """The lines of a text joined by spaces; other spaces are kept, because file names may have them."""
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def first_line(error: Exception) -> str:
    """The first line of another library's message, at most 200 characters; the error's class where it is empty."""
    return str(error).split("\n")[0][:200] or type(error).__name__


def require(condition: bool, what: str, where: str) -> None:
    """Raise ConfigError unless `condition`; for the checks of settings."""
    if not condition:
        raise ConfigError(what, where=where)


def nearest(name: str, known) -> str:
    """`did you mean 'x'?` for the closest of `known`, or the whole list when nothing is close."""
    import difflib

    known = [str(k) for k in known]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(known)}"
