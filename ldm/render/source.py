"""A prompt file that can be read twice: as it was when the run began, whatever happens to it meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ldm.errors import ConfigError
from ldm.files import disk_errors
from ldm.render.parse import Entry, read_entries, stdin_file

Read = Callable[[], Iterator[Entry]]


@contextlib.contextmanager
def held(prompts: str | os.PathLike | Iterable) -> Iterator[tuple[str, Read]]:
    """(what the prompts are called, a function that gives their entries, the same each time).

    Files and standard input ("-") are copied to the temporary folder. Raises ConfigError where there is no such file.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        items = list(prompts)
        yield "prompts", lambda: read_entries(items)
        return
    if os.fspath(prompts) == "-":
        with stdin_file() as copy:
            yield "stdin", lambda: read_entries(copy, "stdin", Path())
        return
    path = Path(prompts)
    with tempfile.TemporaryDirectory(prefix="ldm-render-") as folder:
        copy = Path(folder) / f"prompts{path.suffix}"
        try:
            with path.open("rb") as source, disk_errors(copy), copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except FileNotFoundError:
            raise ConfigError("no such prompt file", where=path) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot be read ({error})", where=path) from None
        yield str(path), lambda: read_entries(copy, str(path), path.parent)
