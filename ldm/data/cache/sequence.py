"""The batches of a prepared dataset: shards in sequence with a keyed shuffle, in memory that does not grow with it.

An epoch is a list of windows: some shards of one size that are read together. Shards are dealt to windows anew in each
epoch, the windows are shuffled, and so are the samples inside of each: every row, as often as it repeats. All of it is
a function of (seed, epoch, the shards' names, the batch size): a run can go on anywhere.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.data.buckets import shuffle_keys
from ldm.data.cache.prepared import TEXT, ShardName, captions_in, read_shard
from ldm.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

WINDOW_BYTES = 128 << 20  # of the shards that are read together; two windows are in memory
WINDOW_SHARDS = 64


@dataclass(frozen=True)
class Rows:
    """The rows of one batch."""

    mean: torch.Tensor  # (B, C, h, w) as stored
    std: torch.Tensor
    sizes: torch.Tensor  # (B, 6)
    ids: list[str]
    captions: list[list[str]]
    texts: list[dict[str, torch.Tensor]]  # of each row: name -> (captions, …); empty without embeddings
    epoch: int
    repeat: list[int]  # of each row: which of its times in the epoch this is, from 0
    mask: torch.Tensor | None = None  # (B, 1, h, w) in [0, 1]; None where no image of the window has one


class _Window:
    """Some shards in memory, one sample after the other: a row, as often as an epoch has it."""

    def __init__(self, shards: Sequence[ShardName]):
        self.tensors = [read_shard(shard.path) for shard in shards]
        self.tables = [captions_in(tensors) for tensors in self.tensors]
        self.starts = [0]  # of each shard's samples
        self.begins: list[Sequence[int]] = []  # of each shard: where the samples of a row begin
        self.texts: list[list[int]] = []  # of each shard: where the captions of a row begin
        for table, tensors in zip(self.tables, self.tensors):
            self.begins.append(_begins(tensors, len(table)))
            self.starts.append(self.starts[-1] + self.begins[-1][-1])
            places = [0]
            for _, captions in table:
                places.append(places[-1] + max(1, len(captions)))
            self.texts.append(places)

    def rows(self, places: Sequence[int], epoch: int) -> Rows:
        import torch

        found, repeat = [], []
        for place in places:
            shard = bisect.bisect_right(self.starts, place) - 1
            begins, sample = self.begins[shard], place - self.starts[shard]
            row = bisect.bisect_right(begins, sample) - 1
            found.append((shard, row))
            repeat.append(sample - begins[row])
        table = [self.tables[shard][row] for shard, row in found]
        mean, std, sizes = (
            torch.stack([self.tensors[shard][name][row] for shard, row in found]) for name in ("mean", "std", "sizes")
        )
        texts = [self._texts(shard, row) for shard, row in found]
        ids, captions = [id for id, _ in table], [several for _, several in table]
        return Rows(mean, std, sizes, ids, captions, texts, epoch, repeat, self._masks(found))

    def _masks(self, found: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        import torch

        if not any("mask" in tensors for tensors in self.tensors):
            return None
        whole = torch.ones(1, *self.tensors[0]["mean"].shape[-2:])
        masks = [(self.tensors[shard].get("mask"), row) for shard, row in found]
        return torch.stack([whole if mask is None else mask[row].float() / 255 for mask, row in masks])

    def _texts(self, shard: int, row: int) -> dict[str, torch.Tensor]:
        begin, end = self.texts[shard][row : row + 2]
        tensors = self.tensors[shard]
        return {name.removeprefix(TEXT): t[begin:end] for name, t in tensors.items() if name.startswith(TEXT)}


def _begins(tensors: Mapping[str, torch.Tensor], rows: int) -> Sequence[int]:
    """Where the samples of each row of a shard begin, and where the last one's end."""
    if "repeats" not in tensors:
        return range(rows + 1)
    return [0, *tensors["repeats"].cumsum(0).tolist()]


class ShardSequence:
    """Batches by number, of shards of any count. Raises DataError where there is none."""

    def __init__(self, shards: Sequence[ShardName], batch_size: int, seed: int, window_bytes: int = WINDOW_BYTES):
        if not shards:
            raise DataError("holds no shard to train on", hint="run ldm data cache")
        self.shards, self.batch_size, self.seed = list(shards), batch_size, seed
        self.per_window = self._shards_in(window_bytes)
        self.samples = sum(shard.samples for shard in self.shards)
        names = "".join(f"{shard.path.parent.name}/{shard.path.name}\n" for shard in self.shards)
        self.hash = hashlib.sha256(names.encode()).hexdigest()
        self._groups: dict[tuple[int, int], list[int]] = {}
        for number, shard in enumerate(self.shards):
            self._groups.setdefault(shard.size, []).append(number)
        self._begins = [0]  # of each epoch, in batches
        self._plans: dict[int, tuple[list[list[int]], list[int]]] = {}  # of this epoch and the next
        self._ordered: tuple[tuple[int, ...], np.ndarray] | None = None  # of this window
        self._loaded: dict[tuple[int, ...], Future[_Window]] = {}
        self._threads = ThreadPoolExecutor(1, "shards")

    def _shards_in(self, window_bytes: int) -> int:
        largest = max(shard.path.stat().st_size for shard in self.shards[:64])
        return max(1, min(WINDOW_SHARDS, window_bytes // max(1, largest)))

    def at(self, number: int) -> Rows:
        """The number-th batch since the beginning, always the same; the next window is read meanwhile."""
        epoch, number = self._epoch_of(number)
        windows, ends = self._planned(epoch)
        place = bisect.bisect_right(ends, number)
        window, begin = windows[place], ends[place - 1] if place else 0
        upcoming = windows[place + 1] if place + 1 < len(windows) else self._planned(epoch + 1)[0][0]
        loaded = self._load(window, upcoming)
        order = self._order(window, epoch)
        start = (number - begin) * self.batch_size
        return loaded.rows(order[start : start + self.batch_size].tolist(), epoch)

    def _load(self, window: list[int], upcoming: list[int]) -> _Window:
        for key in self._loaded.keys() - {tuple(window), tuple(upcoming)}:
            self._loaded.pop(key).cancel()
        for wanted in (window, upcoming):
            if tuple(wanted) not in self._loaded:
                shards = [self.shards[i] for i in wanted]
                self._loaded[tuple(wanted)] = self._threads.submit(_Window, shards)
        return self._loaded[tuple(window)].result()

    def _order(self, window: list[int], epoch: int) -> np.ndarray:
        import numpy as np

        key = (epoch, *window)
        if self._ordered is None or self._ordered[0] != key:
            samples = sum(self.shards[i].samples for i in window)
            keys = shuffle_keys(samples, self.seed, "rows", epoch, window[0])
            self._ordered = (key, np.argsort(keys, kind="stable"))
        return self._ordered[1]

    def _epoch_of(self, number: int) -> tuple[int, int]:
        """(epoch, number of the batch in it). Epochs differ by a few batches: windows have smaller last ones."""
        while self._begins[-1] <= number:
            self._begins.append(self._begins[-1] + self._windows(len(self._begins) - 1)[1][-1])
        epoch = bisect.bisect_right(self._begins, number) - 1
        return epoch, number - self._begins[epoch]

    def _planned(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        if epoch not in self._plans:
            self._plans = {known: plan for known, plan in self._plans.items() if abs(known - epoch) == 1}
            self._plans[epoch] = self._windows(epoch)
        return self._plans[epoch]

    def _windows(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """The windows of an epoch in their order, and where the batches of each end."""
        import numpy as np

        dealt = []
        for size, group in sorted(self._groups.items()):
            order = np.argsort(shuffle_keys(len(group), self.seed, "shards", epoch, size), kind="stable")
            mixed = [group[i] for i in order.tolist()]
            dealt += [mixed[i : i + self.per_window] for i in range(0, len(mixed), self.per_window)]
        order = np.argsort(shuffle_keys(len(dealt), self.seed, "windows", epoch), kind="stable")
        windows, ends = [dealt[i] for i in order.tolist()], []
        for window in windows:
            samples = sum(self.shards[i].samples for i in window)
            ends.append((ends[-1] if ends else 0) + -(-samples // self.batch_size))
        return windows, ends

    def close(self) -> None:
        """Stop reading ahead."""
        self._threads.shutdown(cancel_futures=True)
