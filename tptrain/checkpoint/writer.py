"""A rank's file of a checkpoint: values copied aside, and bytes written, summed and put on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from tptrain.checkpoint.manifest import PIECE_BYTES, FileNote


class Staging:
    """Memory that a rank copies its part of a checkpoint into, so that training can go on. It is kept for the next one.

    As large as what the rank writes, in the host's memory; pinned where the values are on a GPU.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, values: Sequence[Tensor]) -> Tensor:
        """The bytes of all `values`, one after the other: uint8 [bytes]. They hold until the next call."""
        total = sum(value.nbytes for value in values)
        if self._memory.numel() != total:
            on_gpu = any(value.is_cuda for value in values)
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        at = 0
        for value in values:
            place = self._memory[at : at + value.nbytes].view(value.dtype).view(value.shape)
            place.copy_(value, non_blocking=True)
            at += value.nbytes
        if any(value.is_cuda for value in values):
            torch.cuda.current_stream().synchronize()
        return self._memory


def as_bytes(value: Tensor) -> Tensor:
    """The bytes of a tensor on any device: uint8 [bytes] in the host's memory, without a copy where it lies there in one piece."""
    return value.cpu().contiguous().reshape(-1).view(torch.uint8)


def write_file(path: Path, pieces: Iterable[Tensor], progress: Callable[[int], None]) -> FileNote:
    """Write uint8 tensors one after the other and put them on disk. Returns the file's note; raises OSError.

    progress: called with the bytes written so far.
    """
    checksum, written = xxhash.xxh3_64(), 0
    with open(path, "wb", buffering=0) as file:
        for piece in pieces:
            data = piece.numpy().data
            for first in range(0, len(data), PIECE_BYTES):
                part = data[first : first + PIECE_BYTES]
                checksum.update(part)
                while part:
                    part = part[file.write(part) :]
                written += min(PIECE_BYTES, len(data) - first)
                progress(written)
        os.fsync(file.fileno())
    return FileNote(written, checksum.hexdigest())
