"""Files read and written past the operating system's page cache, where that is possible.

A checkpoint is written once and read once. To copy it through the page cache costs the processor more than everything else that happens
to it, and an asynchronous save takes that from the training. So files are opened with O_DIRECT, which wants memory, places and lengths in
multiples of a block. File systems that do not know it get the same calls without.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

BLOCK = 4096
"""Bytes. What O_DIRECT works in multiples of: no disk in use has larger ones."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def round_up(count: int) -> int:
    """The next multiple of a block.

    >>> round_up(0), round_up(1), round_up(4096)
    (0, 4096, 4096)
    """
    return -(-count // BLOCK) * BLOCK


class Buffer:
    """Memory for whole blocks, used again and again: fresh memory is several times as slow as a disk on some virtual machines."""

    def __init__(self, length: int) -> None:
        self.length = round_up(length)
        self.bytes = memoryview(mmap.mmap(-1, self.length))
        self._values = torch.frombuffer(self.bytes, dtype=torch.uint8)

    def view(self, at: int, dtype: torch.dtype, size: tuple[int, ...]) -> Tensor:
        """A tensor of the numbers that stand at byte `at`, a multiple of their width; it shares the memory."""
        length = torch.Size(size).numel() * dtype.itemsize
        return self._values[at : at + length].view(dtype).view(size)


class DirectFile:
    """A file that is open for whole blocks. Everything here raises OSError."""

    def __init__(self, path: Path, flags: int) -> None:
        """flags: as in os.open."""
        self._direct = _DIRECT
        try:
            self._descriptor = os.open(path, flags | _DIRECT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = 0
            self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

    def read(self, buffer: memoryview, at: int) -> int:
        """Fill a buffer from byte `at` on. Returns how many bytes there were: fewer than asked for where the file ends."""
        done = 0
        while done < len(buffer) and (count := self._call(os.preadv, buffer[done:], at + done)):
            done += count
        return done

    def write(self, buffer: memoryview, at: int) -> None:
        """Write a buffer at byte `at`."""
        done = 0
        while done < len(buffer):
            done += self._call(os.pwritev, buffer[done:], at + done)

    def finish(self, length: int) -> None:
        """Cut off what is past `length` bytes, and put the file on disk."""
        os.ftruncate(self._descriptor, length)
        os.fsync(self._descriptor)

    def _call(self, function: Callable[[int, list[memoryview], int], int], buffer: memoryview, at: int) -> int:
        """Read or write; without O_DIRECT from where the file system finds that it can't after all, as after half a block."""
        try:
            return function(self._descriptor, [buffer], at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        self._direct = 0
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_DIRECT)
        return function(self._descriptor, [buffer], at)
