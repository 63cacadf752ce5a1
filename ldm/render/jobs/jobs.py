"""From entries to jobs: one for each image, with a key of its own and a name for its file.

A job's key hashes its resolved settings, the hashes of model, LoRAs and input images, and how many equal jobs came
before it. A line without seed gets one from the run's seed, its content, and how many equal lines came before it. So
a line inserted above changes no image below it.
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
from ldm.render.prompts.entry import Entry
from ldm.render.prompts.line_settings import with_own_controls
from ldm.render.prompts.setting_table import LINE, NOT_CONTENT, TEXTS, of_scope
from ldm.render.prompts.templates import SIGNS, Wildcards, expand

NOT_RESOLVED = of_scope(LINE)  # a line's settings that are no job's
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
            hint = "write for example 1/3, 2/3 and 3/3 on three machines"
            raise ConfigError(f"{text!r:.40} is no shard", where="shard", hint=hint)
        return cls(int(match[1]), int(match[2]))

    def __contains__(self, key: str) -> bool:
        return self.of == 1 or short(key) % self.of == self.number - 1

    def file(self, stem: str) -> str:
        """manifest.jsonl, or manifest-1-of-3.jsonl."""
        return f"{stem}.jsonl" if self.of == 1 else f"{stem}-{self.number}-of-{self.of}.jsonl"


@dataclass(frozen=True, slots=True)
class Job:
    """One image to draw."""

    index: int  # among all images of the prompt file, from 1
    key: str  # 32 hex digits
    where: str  # prompts.txt:12
    stem: str  # of its file's name, where that is free
    settings: Mapping[str, Any]  # resolved: JSON
    source: Mapping[str, Any] | None = None  # the Entry's
    sheet: tuple[int, str] | None = None  # the Entry's

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    def stems(self) -> tuple[str, str, str]:
        """Names for its file, to be tried in this order; no other job has the last."""
        return self.stem, f"{self.stem}-{self.key[:LONG]}", f"{self.stem}-{self.key}"


class Plan:
    """The jobs of a prompt file, in its order: iterate once; bad lines come as entries with an error, in their place.

    entries    from read_entries
    defaults   settings of lines that leave them out, under our names (the command line's)
    resolve    fills in what the model decides and checks it; raises LdmError for settings that do not fit the model
    run_seed   the seeds of lines without one come from it
    wildcards  the folder of __wildcards__; None: prompts hold no templates (they were expanded before)
    shard      only these jobs are given; the others are counted in `other_shards`

    After iterating: lines, bad (of them), jobs (of this shard), other_shards. Memory: at most 150 bytes an image.
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
        self.lines = self.bad = self.jobs = self.other_shards = 0

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
        line, given = entry.settings, {**self._defaults, **entry.settings}
        if "control" in given:
            line, given = with_own_controls(line), with_own_controls(given)
        asked = {name: value for name, value in given.items() if name not in NOT_RESOLVED}
        varied = bool(asked.get("variation_strength")) and asked.get("variation_seed") is not None
        for number, seed in enumerate(self._seeds(line, given.get("num_images") or 1, varied)):
            variation = {"variation_seed": asked["variation_seed"] + number} if varied else {}
            texts = self._texts(asked, seed)
            settings, hashes = self._resolve({**asked, **texts, **variation, "seed": seed})
            job = self._job(entry, settings, hashes, number)
            if job.key in self._shard:
                self.jobs += 1
                yield job
            else:
                self.other_shards += 1

    def _seeds(self, line: Mapping[str, Any], images: int, varied: bool) -> Iterator[int]:
        """The seed of each image of a line: the line's, or drawn from its content.

        Image k has seed + k; variations of one image share its seed, and their own seed counts up instead.
        """
        seeds = line.get("seed")
        content = canonical({name: value for name, value in line.items() if name not in NOT_CONTENT})
        if varied and not isinstance(seeds, tuple):
            seeds = (self._drawn_seed(content, 0) if seeds is None else seeds,) * images
        elif not isinstance(seeds, tuple):
            seeds = [None] * images if seeds is None else range(seeds, seeds + images)
        for k, seed in enumerate(seeds):
            yield self._drawn_seed(content, k) if seed is None else seed

    def _drawn_seed(self, content: bytes, k: int) -> int:
        """The seed of image `k` of a line without one: k more than that of image 0 of as many equal lines."""
        occurrence = self._lines.count(hashlib.sha256(content + k.to_bytes(4, "big")).digest())
        drawn = hashlib.sha256(b"%d:%d:" % (self._run_seed, occurrence) + content).digest()
        return int.from_bytes(drawn[:8], "big") % (2**32 - MAX_IMAGES) + k

    def _texts(self, asked: Mapping[str, Any], seed: int) -> dict[str, str]:
        """The texts with their templates expanded by `seed`."""
        texts = {}
        for name in TEXTS if self._wildcards is not None else ():
            try:
                if asked.get(name) and SIGNS.search(asked[name]):
                    texts[name] = expand(asked[name], seed, self._wildcards, name)
            except ConfigError as error:
                where = name if error.where == "prompt" else error.where  # or the line of a wildcard file
                raise ConfigError(error.what, where=where, hint=error.hint) from None
        return texts

    def _job(self, entry: Entry, settings: dict[str, Any], hashes: Mapping[str, Any], number: int) -> Job:
        same = hashlib.sha256(canonical({**settings, **hashes})).digest()
        key = hashlib.sha256(same + self._keys.count(same).to_bytes(8, "big")).hexdigest()[:32]
        index = self.jobs + self.other_shards + 1
        stem = f"{index:06d}-{key[:LONG]}"
        if name := entry.settings.get("name") and safe_name(entry.settings["name"]):
            name += f"-{number + 1}" if number else ""
            taken = self._names.count(hashlib.sha256(same_name(name)).digest())
            stem = f"{name}-{key[:SHORT]}" if taken else name
        return Job(index, key, entry.where, stem, settings, entry.source, entry.sheet)


def short(key: str) -> int:
    """64 bits of a job's key."""
    return int(key[:16], 16)


def canonical(value: Any) -> bytes:
    """`value` as the one JSON that stands for it: sorted, whole floats as whole numbers at the top."""
    if isinstance(value, Mapping):
        value = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in value.items()}
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
