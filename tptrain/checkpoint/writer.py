"""Writes tensors' bytes and `tensors.json`, for `torch.distributed.checkpoint`, which decides who writes which chunk.

Each rank writes one file: its chunks, tile after tile (tiles.py), with nothing in between. Tiles are gathered in a buffer, and get their
checksum while the processor's cache still has them; a thread writes one buffer while the next is filled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future as Job
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tptrain.checkpoint.direct import BLOCK, Buffer, DirectFile, round_up
from tptrain.checkpoint.index import Chunk, StoredTensor, tensors_file, write_index
from tptrain.checkpoint.tiles import grid, parts, slices, tiles_of
from tptrain.files import sync_folder

BATCH_BYTES = 4 << 20
"""So much is written at a time."""


class TileWriter(StorageWriter):
    """One rank's side of a save into a folder that exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is left of an earlier save."""

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **_options: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave out what is empty: of a dimension shorter than the ranks that split it, the last ones have nothing."""
        return replace(plan, items=[item for item in plan.items if 0 not in _data(item).chunk.sizes])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name each rank's file."""
        return [replace(plan, storage_data=tensors_file(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file and put it on disk. Raises OSError, which names the file."""
        results: list[WriteResult] = []
        path = self._folder / plan.storage_data
        if plan.items:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with _naming(path), DirectFile(path, flags) as file, ThreadPoolExecutor(1, "checkpoint-writer") as pool:
                stream = _Stream(file, pool)
                for item in sorted(plan.items, key=_order):
                    values = planner.resolve_data(item)
                    assert isinstance(values, Tensor)
                    chunk = _write_chunk(stream, path.name, values.detach(), _data(item))
                    results.append(WriteResult(item.index, values.nbytes, chunk))
                stream.finish()
            sync_folder(self._folder)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `tensors.json`, on the first rank, once all have written. Raises OSError."""
        tensors: dict[str, StoredTensor] = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            dtype, shape = tensor.properties.dtype, tuple(tensor.size)
            tensors[key] = StoredTensor(dtype, shape, parts(shape, dtype.itemsize), {})
        for written in results:
            for result in written:
                tensors[result.index.fqn].chunks[result.storage_data.offset] = result.storage_data
        write_index(self._folder, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be the place of a checkpoint: not asked, since the folder is given to the class."""
        return True


class _Stream:
    """Tensors on their way into a file, one after the other from its beginning.

    Two buffers take turns. Each begins at a block of the file, so numbers are aligned in memory as they are there.
    """

    def __init__(self, file: DirectFile, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool = file, pool
        self._buffer, self._other = Buffer(BATCH_BYTES), Buffer(BATCH_BYTES)
        self._first = 0  # where in the file the buffer begins
        self._used = 0
        self._writing: Job[None] | None = None

    @property
    def at(self) -> int:
        """Where in the file the next tensor will begin."""
        return self._first + self._used

    def add(self, values: Tensor) -> str:
        """Add a tensor's numbers, row by row. Returns their checksum. Raises OSError."""
        end = self._used + values.nbytes
        if end > self._buffer.length:
            self._write()
            end = self._used + values.nbytes
        if end > self._buffer.length:  # a tile that is larger than a batch
            larger = Buffer(end)
            larger.bytes[: self._used] = self._buffer.bytes[: self._used]
            self._buffer = larger
        self._buffer.view(self._used, values.dtype, tuple(values.shape)).copy_(values)
        added = self._buffer.bytes[self._used : end]
        self._used = end
        return xxhash.xxh3_64_hexdigest(added)

    def finish(self) -> None:
        """Write what is left, and put the file on disk. Raises OSError."""
        length = self.at
        self._used = round_up(self._used)
        self._write()
        self._wait()
        self._file.finish(length)

    def _write(self) -> None:
        """Have the buffer's whole blocks written, and go on in the other one with what is left."""
        self._wait()
        whole = self._used // BLOCK * BLOCK
        self._other.bytes[: self._used - whole] = self._buffer.bytes[whole : self._used]
        self._writing = self._pool.submit(self._file.write, self._buffer.bytes[:whole], self._first)
        self._buffer, self._other = self._other, self._buffer
        self._first, self._used = self._first + whole, self._used - whole

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _write_chunk(stream: _Stream, file: str, values: Tensor, data: TensorWriteData) -> Chunk:
    """Add a chunk's tiles to those that are written. Returns where they will be."""
    at, offset, size = stream.at, tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    tiles = tiles_of(grid(data.size, parts(data.size, values.itemsize), offset, size), values.itemsize)
    checksums = [stream.add(values[slices(offset, tile.offset, tile.size)]) for tile in tiles]
    return Chunk(file, at, offset, size, "".join(checksums))


def _order(item: WriteItem) -> tuple[int, int]:
    """Wide numbers before narrow ones, so that each begins at a multiple of its width; of these large chunks first, so that those which are
    whole blocks begin at one."""
    data = _data(item)
    width = data.properties.dtype.itemsize
    return -width, -data.chunk.sizes.numel() * width


def _data(item: WriteItem) -> TensorWriteData:
    """What torch knows of an item's chunk. All items are tensors here."""
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file, as one from a descriptor does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
