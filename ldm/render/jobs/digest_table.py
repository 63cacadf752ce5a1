"""A map from 64-bit digests to numbers in 16 bytes a place: what is remembered of a million lines."""

from __future__ import annotations

from array import array


class Table:
    """Open addressing over two arrays, at most two thirds full; a dict needs some 70 bytes an entry."""

    def __init__(self, places: int = 1 << 10):
        self._count, self._mask = 0, places - 1
        self._keys, self._values = array("Q", bytes(8 * places)), array("Q", bytes(8 * places))

    def __len__(self) -> int:
        return self._count

    def get(self, digest: bytes) -> int | None:
        """The number kept for a digest (its first 8 bytes count), or None."""
        key, place = self._find(digest)
        return self._values[place] if self._keys[place] == key else None

    def set(self, digest: bytes, value: int) -> None:
        """Keep `value` (64 bits) for a digest."""
        key, place = self._find(digest)
        if self._keys[place] != key:
            self._keys[place] = key
            self._count += 1
        self._values[place] = value
        if 3 * self._count > 2 * len(self._keys):
            self._grow()

    def count(self, digest: bytes) -> int:
        """How often this digest was counted before."""
        before = self.get(digest) or 0
        self.set(digest, before + 1)
        return before

    def _find(self, digest: bytes) -> tuple[int, int]:
        key = int.from_bytes(digest[:8], "big") or 1  # 0 is an empty place
        keys, mask = self._keys, self._mask
        place = key & mask
        while keys[place] and keys[place] != key:
            place = (place + 1) & mask
        return key, place

    def _grow(self) -> None:
        old = self._keys, self._values
        places = 2 * len(self._keys)
        self._mask = places - 1
        self._keys, self._values = array("Q", bytes(8 * places)), array("Q", bytes(8 * places))
        keys, values, mask = self._keys, self._values, self._mask
        for key, value in zip(*old):
            if key:
                place = key & mask
                while keys[place]:
                    place = (place + 1) & mask
                keys[place], values[place] = key, value
