"""Tensors as bytes: boxes of a tensor, views of its memory, and a small buffer that is used again and again.

Memory that a process touches for the first time is slow, several times as slow as a disk on some virtual machines: so nothing here is as
large as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BATCH_BYTES = 4 << 20
"""So much is read or written at a time."""
BATCH_TILES = 256
"""And so many tiles at most; a system call takes 1024 on Linux."""
_ALIGNMENT = 64
"""Bytes. No type of number needs more, and copies are fastest from the beginning of a cache line."""


class Scratch:
    """Room for a batch of tiles."""

    def __init__(self) -> None:
        self._memory = torch.empty(BATCH_BYTES + BATCH_TILES * _ALIGNMENT, dtype=torch.uint8)
        self._bytes = as_bytes(self._memory)
        self._used = 0

    def take(self, dtype: torch.dtype, size: Sequence[int]) -> tuple[Tensor, memoryview]:
        """A contiguous tensor, uninitialised, and its bytes. They are valid until `clear`."""
        length = math.prod(size) * dtype.itemsize
        if self._used + length > self._memory.numel():  # one tile that is larger than a batch
            self._memory, self._used = torch.empty(length, dtype=torch.uint8), 0
            self._bytes = as_bytes(self._memory)
        first = self._used
        self._used = -(-(first + length) // _ALIGNMENT) * _ALIGNMENT
        return self._memory[first : first + length].view(dtype).view(tuple(size)), self._bytes[first : first + length]

    def clear(self) -> None:
        """Take it all back."""
        self._used = 0


def box_of(values: Tensor, first: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> Tensor:
    """The view of the box of a whole tensor at `offset` and as long as `size`, where `values` are its box that begins at `first`."""
    return values[tuple(slice(at - begin, at - begin + length) for at, begin, length in zip(offset, first, size, strict=True))]


def in_one_piece(values: Tensor) -> bool:
    """Whether a tensor's memory can be read from and written to as it is."""
    return values.is_cpu and values.is_contiguous()


def as_bytes(values: Tensor) -> memoryview:
    """The bytes of a tensor that is in one piece, not copied: writing to them is writing to it."""
    return values.view(-1).view(torch.uint8).numpy().data
