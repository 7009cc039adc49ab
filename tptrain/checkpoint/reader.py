"""Reads tensors that `writer.py` wrote, for `torch.distributed.checkpoint`, which decides which part of which chunk goes where.

A rank reads just the tiles that hold something it needs, each whole, compares the checksum, and copies what it needs. Tiles that follow
each other in a file are read together; a thread reads the next ones meanwhile. Nothing but numbers is made of what the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future as Job
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from tptrain.checkpoint.direct import BLOCK, Buffer, DirectFile, round_up
from tptrain.checkpoint.index import CHECKSUM_DIGITS, StoredTensor, read_index
from tptrain.checkpoint.manifest import DamagedCheckpoint, check_manifest, file_size, unreadable
from tptrain.checkpoint.tiles import Tile, overlap, slices

BATCH_BYTES = 4 << 20
"""So much is read at a time, or one tile."""


class UnfitCheckpoint(Exception):
    """A checkpoint is whole, but lacks tensors that are asked for, or has them in another shape. One line that names some."""


class _Read(NamedTuple):
    """A tile that is wanted."""

    key: str
    dtype: torch.dtype
    at: int
    """Its first byte in its file."""
    tile: Tile
    checksum: str
    offset: tuple[int, ...]
    """The first corner of the part that is wanted, in the whole tensor."""
    target: Tensor
    """The part of a tensor in memory that it goes to."""

    @property
    def end(self) -> int:
        """One past its last byte in its file."""
        return self.at + self.tile.bytes


class TileReader(StorageReader):
    """One rank's side of a load."""

    def __init__(self, folder: Path, complete: bool) -> None:
        """complete: compare the folder with its manifest first."""
        self._folder, self._complete = folder, complete
        self._tensors: dict[str, StoredTensor] = {}
        self._damage: DamagedCheckpoint | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is left of an earlier load."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """What tensors there are. Damage is raised in the next step: torch takes an error here for another kind of checkpoint."""
        try:
            if self._complete:
                check_manifest(self._folder)
            self._tensors = read_index(self._folder)
        except DamagedCheckpoint as damage:
            self._damage = damage
        return Metadata({key: _described(tensor) for key, tensor in self._tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_options: Any) -> None:
        """Raises DamagedCheckpoint where the manifest or `tensors.json` is wrong, or the files are not those."""
        if self._damage is not None:
            raise self._damage

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank reads for itself."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors. Raises DamagedCheckpoint, which names the file."""
        wanted: dict[str, list[_Read]] = {}
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            for file, read in self._reads(item, target):
                wanted.setdefault(file, []).append(read)
        with ThreadPoolExecutor(1, "checkpoint-reader") as pool:
            for file, reads in sorted(wanted.items()):
                _read_file(self._folder / file, sorted(reads, key=lambda read: read.at), pool)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _reads(self, item: ReadItem, target: Tensor) -> Iterator[tuple[str, _Read]]:
        """The tiles, each with its file, that fill `target`."""
        key = item.storage_index.fqn
        tensor = self._tensors[key]
        assert item.storage_index.offset is not None
        chunk = tensor.chunks[tuple(item.storage_index.offset)]
        first = [begin + offset for begin, offset in zip(chunk.offset, item.storage_offsets, strict=True)]
        for number, tile in enumerate(tensor.tiles(chunk)):
            found = overlap(first, item.lengths, tile.offset, tile.size)
            if found is not None:
                offset, size = found
                checksum = chunk.checksums[CHECKSUM_DIGITS * number :][:CHECKSUM_DIGITS]
                place = target[slices(first, offset, size)]
                yield chunk.file, _Read(key, tensor.dtype, chunk.at + tile.at, tile, checksum, offset, place)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be the place of a checkpoint: not asked, since the folder is given to the class."""
        return True


class FittingPlanner(DefaultLoadPlanner):
    """torch's planner, which looks first whether the checkpoint is of this model.

    A rank's plan concerns no other rank, so it stays here instead of travelling to the first rank and back.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._folder = folder
        self._plan = LoadPlan([])

    def create_local_plan(self) -> LoadPlan:
        """Plan what to read for this rank's tensors. Raises UnfitCheckpoint."""
        assert self.metadata is not None
        wrong = []
        for key, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                wrong.append(f"no {key}")
            elif stored.size != tensor.shape:
                wrong.append(f"{key} as {list(stored.size)}, not {list(tensor.shape)}")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UnfitCheckpoint(f"{self._folder} has {', '.join(wrong[:3])}{more}")
        plan = super().create_local_plan()
        self._plan = replace(plan, items=[item for item in plan.items if 0 not in item.lengths])  # nothing of what is empty
        return LoadPlan([])

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """What to read."""
        return self._plan


def _described(tensor: StoredTensor) -> TensorStorageMetadata:
    """A tensor on disk in torch's words."""
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)) for chunk in tensor.chunks.values()]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks)


def _read_file(path: Path, reads: Sequence[_Read], pool: ThreadPoolExecutor) -> None:
    """Read tiles of one file, in their order, into their places. Raises DamagedCheckpoint."""
    file_size(path)
    batches = list(_batches(reads))
    length = max(_span(batch)[1] - _span(batch)[0] for batch in batches)
    buffers = cycle([Buffer(length), Buffer(length)])
    try:
        with DirectFile(path, os.O_RDONLY) as file:

            def start(batch: Sequence[_Read]) -> tuple[Buffer, Job[int]]:
                buffer, (first, end) = next(buffers), _span(batch)
                return buffer, pool.submit(file.read, buffer.bytes[: end - first], first)

            coming = start(batches[0])
            for batch, following in zip_longest(batches, batches[1:]):
                buffer, job = coming
                end = _span(batch)[0] + job.result()
                if following is not None:
                    coming = start(following)
                if end < batch[-1].end:
                    raise DamagedCheckpoint(path, f"ends at byte {end:,}, before the tensors that it should hold do")
                _place(path, buffer, batch)
    except OSError as error:
        raise unreadable(path, error) from None


def _batches(reads: Sequence[_Read]) -> Iterator[list[_Read]]:
    """Tiles that are read together: no block between them is without one, and they are not too many."""
    batch: list[_Read] = []
    for read in reads:
        if batch and (read.at > round_up(batch[-1].end) or read.end - _span(batch)[0] > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(read)
    yield batch


def _span(batch: Sequence[_Read]) -> tuple[int, int]:
    """The first byte of a file that is read for a batch, and one past the last: whole blocks."""
    return batch[0].at // BLOCK * BLOCK, round_up(batch[-1].end)


def _place(path: Path, buffer: Buffer, batch: Sequence[_Read]) -> None:
    """Compare the tiles that a buffer holds, and put them in their places. Raises DamagedCheckpoint."""
    first = _span(batch)[0]
    for read in batch:
        at, end, tile = read.at - first, read.end - first, read.tile
        if xxhash.xxh3_64_hexdigest(buffer.bytes[at:end]) != read.checksum:
            rule = f"is not what was written: bytes {read.at:,} to {read.end:,}, of {read.key}, have another checksum"
            raise DamagedCheckpoint(path, rule)
        values = buffer.view(at, read.dtype, tile.size)
        read.target.copy_(values[slices(tile.offset, read.offset, read.target.shape)])
