"""From entries to jobs: one a picture, with a key that tells it from every other and a name for its file.

A job's key hashes its resolved settings, the hashes of model, LoRAs and input pictures, and how many equal jobs came
before it. A line without seed gets one from the run's seed, what it says, and how many equal lines came before it. So
a line inserted above changes no picture below it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import ConfigError, LdmError
from ldm.pipeline.keywords import MAX_IMAGES
from ldm.render.jobs.digest_table import Table
from ldm.render.jobs.filenames import safe_name, same_name
from ldm.render.prompts.files import Entry
from ldm.render.prompts.line_settings import TEXTS
from ldm.render.prompts.templates import Wildcards, expand

NOT_OF_THE_PICTURE = ("name", "num_images", "seed")  # of a line's settings
LONG, SHORT = 12, 8  # hex digits of the key in file names

# (a job's settings with its seed) -> (them with every default of the model, {setting: hash of what it names})
Resolve = Callable[[dict[str, Any]], tuple[dict[str, Any], Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `number` of `of` parts, by key."""

    number: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str) -> Shard:
        """From i/n, i counting from 1. Raises ConfigError."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            todo = "write for example 1/3, 2/3 and 3/3 on three machines"
            raise ConfigError(f"{text!r:.40} is no shard", where="shard", todo=todo)
        return cls(int(match[1]), int(match[2]))

    def __contains__(self, key: str) -> bool:
        return self.of == 1 or short(key) % self.of == self.number - 1

    def file(self, stem: str) -> str:
        """manifest.jsonl, or manifest-1-of-3.jsonl."""
        return f"{stem}.jsonl" if self.of == 1 else f"{stem}-{self.number}-of-{self.of}.jsonl"


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to draw."""

    index: int  # among all pictures of the file, from 1
    key: str  # 32 hex digits
    where: str  # prompts.txt:12
    stem: str  # of its file's name, if nobody has it
    settings: Mapping[str, Any]  # as the runner resolved them

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    def stems(self) -> tuple[str, str, str]:
        """Names for its file, to be tried in this order; the last is the job's alone."""
        return self.stem, f"{self.stem}-{self.key[:LONG]}", f"{self.stem}-{self.key}"


class Plan:
    """The jobs of a prompt file, in its order: iterate once; bad lines come as entries with an error, in their place.

    entries    from read_entries
    defaults   settings for lines that say nothing, under our names (the command line's)
    resolve    fills in what the model decides and checks it; raises LdmError for settings that do not fit the model
    run_seed   what the seeds of lines without one come from
    wildcards  the folder of __wildcards__; None: prompts hold no templates (they were expanded before)
    shard      only these jobs are given; the others are counted in `elsewhere`

    After iterating: lines, bad (of them), jobs (of this shard), elsewhere. Memory: at most 150 bytes a picture.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        defaults: Mapping[str, Any],
        resolve: Resolve,
        run_seed: int = 0,
        wildcards: Wildcards | None = None,
        shard: Shard | None = None,
    ):
        self._entries, self._defaults, self._resolve = entries, dict(defaults), resolve
        self._run_seed, self._wildcards, self._shard = run_seed, wildcards, shard or Shard()
        self._lines, self._keys, self._names = Table(), Table(), Table()
        self.lines = self.bad = self.jobs = self.elsewhere = 0

    def __iter__(self) -> Iterator[Job | Entry]:
        for entry in self._entries:
            self.lines += 1
            if entry.error is None:
                try:
                    yield from self._of_line(entry)
                    continue
                except LdmError as error:
                    entry = entry.refused(error)
            self.bad += 1
            yield entry

    def _of_line(self, entry: Entry) -> Iterator[Job]:
        """The jobs of one line; raises LdmError at the first that cannot be."""
        line = entry.settings
        asked = {name: value for name, value in {**self._defaults, **line}.items() if name not in NOT_OF_THE_PICTURE}
        for number, seed in enumerate(self._seeds(line)):
            settings, hashes = self._resolve({**asked, **self._texts(asked, seed), "seed": seed})
            job = self._job(entry, settings, hashes, number)
            if job.key in self._shard:
                self.jobs += 1
                yield job
            else:
                self.elsewhere += 1

    def _seeds(self, line: Mapping[str, Any]) -> Iterator[int]:
        """The seed of each picture of a line: its own, or drawn from what the line says."""
        given = line.get("seed")
        images = line.get("num_images") or self._defaults.get("num_images") or 1
        if not isinstance(given, tuple):
            given = [None] * images if given is None else range(given, given + images)
        own = canonical({name: value for name, value in line.items() if name not in NOT_OF_THE_PICTURE})
        for k, seed in enumerate(given):
            yield self._drawn_seed(own, k) if seed is None else seed

    def _drawn_seed(self, content: bytes, k: int) -> int:
        """The seed of picture `k` of a line that has none; k more than picture 0's, whose line comes as often."""
        occurrence = self._lines.count(hashlib.sha256(content + k.to_bytes(4, "big")).digest())
        drawn = hashlib.sha256(b"%d:%d:" % (self._run_seed, occurrence) + content).digest()
        return int.from_bytes(drawn[:8], "big") % (2**32 - MAX_IMAGES) + k

    def _texts(self, asked: Mapping[str, Any], seed: int) -> dict[str, str]:
        """The texts with their templates drawn by `seed`."""
        texts = {}
        for name in TEXTS if self._wildcards is not None else ():
            try:
                if asked.get(name):
                    texts[name] = expand(asked[name], seed, self._wildcards, name)
            except ConfigError as error:
                where = name if error.where == "prompt" else error.where  # or the line of a wildcard file
                raise ConfigError(error.what, where=where, todo=error.todo) from None
        return texts

    def _job(self, entry: Entry, settings: dict[str, Any], hashes: Mapping[str, Any], number: int) -> Job:
        same = hashlib.sha256(canonical({**settings, **hashes})).digest()
        key = hashlib.sha256(same + self._keys.count(same).to_bytes(8, "big")).hexdigest()[:32]
        index = self.jobs + self.elsewhere + 1
        stem = f"{index:06d}-{key[:LONG]}"
        name = safe_name(entry.settings.get("name", ""))
        if name:
            name += f"-{number + 1}" if number else ""
            taken = self._names.count(hashlib.sha256(same_name(name)).digest())
            stem = f"{name}-{key[:SHORT]}" if taken else name
        return Job(index, key, entry.where, stem, settings)


def short(key: str) -> int:
    """64 bits of a job's key."""
    return int(key[:16], 16)


def canonical(value: Any) -> bytes:
    """`value` as the one JSON that stands for it: sorted, whole floats as whole numbers at the top."""
    if isinstance(value, Mapping):
        value = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in value.items()}
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
