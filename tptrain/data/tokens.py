"""Ids across the shards of a split, as if they were one array.

A shard is mapped when a read first touches it, and a block's checksum is compared when a read first touches that. So opening
costs nothing whatever the size, and no id is handed out that is not the one that was written.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NoReturn

import numpy as np

from tptrain.data.checksums import Damage, FileNote, SummedMap
from tptrain.data.meta import Shard, StoreError

MARK = "damaged"
"""A file of this name in a store says that a reader met damage, so that the next builder checks every file."""
_MAPPED = 256
"""Shards mapped at a time, each of which holds a file descriptor."""


class Tokens:
    """Ids of one split: `len`, and slices without a step as arrays that cannot be written to.

    A slice within one shard is a view of the map; one across shards is a copy. Reads may come from several threads.
    Raises StoreError where a file is missing or damaged, which names the file and the bytes.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._folder, self._shards = folder, shards
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._map = lru_cache(maxsize=_MAPPED)(self._open)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: slice) -> np.ndarray:
        start, end, step = place.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read without a step")
        parts = []
        number = bisect_right(self._ends, start)
        while start < end:
            base = self._ends[number] - self._shards[number].tokens
            stop = min(end, self._ends[number])
            parts.append(self._read(number, start - base, stop - base))
            start, number = stop, number + 1
        if len(parts) == 1:
            return parts[0]
        whole = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        whole.flags.writeable = False
        return whole

    def _read(self, number: int, start: int, end: int) -> np.ndarray:
        size = self.dtype.itemsize
        try:
            found, ids = self._map(number)
            found.check(start * size, end * size)
        except Damage as error:
            refuse_damage(self._folder, error)
        return ids[start:end]

    def _open(self, number: int) -> tuple[SummedMap, np.ndarray]:
        found = SummedMap(self._folder, self._shards[number].file)
        return found, np.frombuffer(found.data, dtype=self.dtype)


def read_offsets(folder: Path, note: FileNote) -> np.ndarray:
    """Where documents start, int64 [documents + 1], mapped and compared whole. Raises StoreError."""
    try:
        found = SummedMap(folder, note)
        found.check(0, note.bytes)
    except Damage as error:
        refuse_damage(folder, error)
    return np.frombuffer(found.data, dtype="<i8")


def leave_mark(folder: Path, damages: Sequence[Damage]) -> None:
    """Have the next builder check every file, where the folder can be written to."""
    with suppress(OSError):
        (folder / MARK).write_text("".join(f"{damage}\n" for damage in damages))


def refuse_damage(folder: Path, damage: Damage) -> NoReturn:
    """Leave the mark, where the folder can be written to, and raise StoreError."""
    leave_mark(folder, [damage])
    raise StoreError(f"{damage}: start the run again, and it is built anew") from damage
