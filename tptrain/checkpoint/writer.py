"""Writes tensors' bytes and `tensors.json`, for `torch.distributed.checkpoint`, which decides who writes which chunk.

Each rank writes one file: the tiles (tiles.py) of its chunks, one after the other. A tile that lies in memory in one piece is written from
there; others are gathered in a small buffer first, and get their checksum while the processor's cache still has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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

from tptrain.checkpoint.index import Chunk, StoredTensor, tensors_file, write_index
from tptrain.checkpoint.memory import BATCH_BYTES, BATCH_TILES, Scratch, as_bytes, box_of, in_one_piece
from tptrain.checkpoint.tiles import grid, parts, tiles_of
from tptrain.files import sync_folder


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
            with _naming(path), open(path, "wb", buffering=0) as file:
                batch = _Batch(file.fileno())
                for item in plan.items:
                    values = planner.resolve_data(item)
                    assert isinstance(values, Tensor)
                    chunk = _write_chunk(batch, path.name, values.detach(), _data(item))
                    results.append(WriteResult(item.index, values.nbytes, chunk))
                batch.write()
                os.fsync(file.fileno())
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


class _Batch:
    """Bytes on their way into a file: what is given, in this order, from the file's beginning."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._written = descriptor, 0
        self._pieces: list[memoryview] = []
        self._bytes = 0
        self._scratch = Scratch()

    @property
    def at(self) -> int:
        """Where in the file the next piece will stand."""
        return self._written + self._bytes

    def add(self, values: Tensor) -> str:
        """Add a tensor's numbers, row by row. They must stay as they are until the next `write`. Returns their checksum."""
        if len(self._pieces) == BATCH_TILES or self._bytes + values.nbytes > BATCH_BYTES:
            self.write()
        if in_one_piece(values):
            piece = as_bytes(values)
        else:
            copy, piece = self._scratch.take(values.dtype, values.shape)
            copy.copy_(values)
        self._pieces.append(piece)
        self._bytes += len(piece)
        return xxhash.xxh3_64_hexdigest(piece)

    def write(self) -> None:
        """Write what was added. Raises OSError."""
        pieces, first = self._pieces, 0
        while first < len(pieces):
            done = os.pwritev(self._descriptor, pieces[first:], self._written)
            self._written += done
            while first < len(pieces) and done >= len(pieces[first]):
                done -= len(pieces[first])
                first += 1
            if done:
                pieces[first] = pieces[first][done:]
        self._pieces, self._bytes = [], 0
        self._scratch.clear()


def _write_chunk(batch: _Batch, file: str, values: Tensor, data: TensorWriteData) -> Chunk:
    """Add a chunk's tiles to those that are written. Returns where they will be."""
    at, offset, size = batch.at, tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    tiles = tiles_of(grid(data.size, parts(data.size, values.itemsize), offset, size), values.itemsize)
    checksums = [batch.add(box_of(values, offset, tile.offset, tile.size)) for tile in tiles]
    return Chunk(file, at, offset, size, "".join(checksums))


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
