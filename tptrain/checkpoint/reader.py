"""Reads tensors that `writer.py` wrote, for `torch.distributed.checkpoint`, which decides which part of which chunk goes where.

A rank reads just the tiles that hold something it needs, each whole, compares the checksum, and copies what it needs; a tile that it needs
whole and has in one piece in memory is read straight into its place. Tiles that follow each other in a file are read together, and the
operating system is told ahead what comes next. Nothing but numbers is made of what the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from tptrain.checkpoint.index import CHECKSUM_DIGITS, StoredTensor, read_index
from tptrain.checkpoint.manifest import DamagedCheckpoint, file_size, unreadable
from tptrain.checkpoint.memory import BATCH_BYTES, BATCH_TILES, Scratch, as_bytes, box_of, in_one_piece
from tptrain.checkpoint.tiles import Tile

_BATCHES_AHEAD = 4
"""The operating system is told of so many batches that will be read next."""


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

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        self._damage: DamagedCheckpoint | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is left of an earlier load."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """What tensors there are. Damage is raised in the next step: torch takes an error here for another kind of checkpoint."""
        try:
            self._tensors = read_index(self._folder)
        except DamagedCheckpoint as damage:
            self._damage = damage
        return Metadata({key: _described(tensor) for key, tensor in self._tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_options: Any) -> None:
        """Raises DamagedCheckpoint where `tensors.json` is wrong."""
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
        scratch = Scratch()
        for file, reads in sorted(wanted.items()):
            _read_file(self._folder / file, sorted(reads, key=lambda read: read.at), scratch)
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
                place = box_of(target, first, offset, size)
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


def overlap(
    offset: Sequence[int], size: Sequence[int], other_offset: Sequence[int], other_size: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The box that two boxes share, or None: its first corner and its lengths.

    >>> overlap([0, 4], [8, 8], [2, 0], [2, 6]), overlap([0], [4], [4], [4])
    (((2, 4), (2, 2)), None)
    """
    first, lengths = [], []
    for begin, length, other, other_length in zip(offset, size, other_offset, other_size, strict=True):
        first.append(max(begin, other))
        lengths.append(min(begin + length, other + other_length) - first[-1])
        if lengths[-1] <= 0:
            return None
    return tuple(first), tuple(lengths)


def _described(tensor: StoredTensor) -> TensorStorageMetadata:
    """A tensor on disk in torch's words."""
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)) for chunk in tensor.chunks.values()]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks)


def _read_file(path: Path, reads: Sequence[_Read], scratch: Scratch) -> None:
    """Read tiles of one file, in their order. Raises DamagedCheckpoint."""
    file_size(path)
    batches = list(_batches(reads))
    try:
        with open(path, "rb", buffering=0) as file:
            announced = iter(batches)
            for batch in islice(announced, _BATCHES_AHEAD):
                _announce(file.fileno(), batch)
            for batch in batches:
                for coming in islice(announced, 1):
                    _announce(file.fileno(), coming)
                _read_batch(path, file.fileno(), batch, scratch)
    except OSError as error:
        raise unreadable(path, error) from None


def _announce(descriptor: int, batch: Sequence[_Read]) -> None:
    """Tell the operating system, where it listens, that a batch will be read."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, batch[0].at, batch[-1].end - batch[0].at, os.POSIX_FADV_WILLNEED)


def _batches(reads: Sequence[_Read]) -> Iterator[list[_Read]]:
    """Tiles that are read together: they follow each other without a gap, and are not too many."""
    batch: list[_Read] = []
    for read in reads:
        if batch and (batch[-1].end != read.at or read.end - batch[0].at > BATCH_BYTES or len(batch) == BATCH_TILES):
            yield batch
            batch = []
        batch.append(read)
    if batch:
        yield batch


def _read_batch(path: Path, descriptor: int, batch: Sequence[_Read], scratch: Scratch) -> None:
    """Read tiles that follow each other, compare them and put them in their places. Raises DamagedCheckpoint and OSError."""
    scratch.clear()
    places: list[Tensor | None] = []
    pieces: list[memoryview] = []
    for read in batch:
        straight = read.target.shape == read.tile.size and read.target.dtype == read.dtype and in_one_piece(read.target)
        tile, piece = (None, as_bytes(read.target)) if straight else scratch.take(read.dtype, read.tile.size)
        places.append(tile)
        pieces.append(piece)
    _fill(path, descriptor, list(pieces), batch[0].at)
    for read, piece, tile_values in zip(batch, pieces, places, strict=True):
        if xxhash.xxh3_64_hexdigest(piece) != read.checksum:
            rule = f"is not what was written: bytes {read.at:,} to {read.end:,}, of {read.key}, have another checksum"
            raise DamagedCheckpoint(path, rule)
        if tile_values is not None:
            read.target.copy_(box_of(tile_values, read.tile.offset, read.offset, read.target.shape))


def _fill(path: Path, descriptor: int, pieces: list[memoryview], at: int) -> None:
    """Fill pieces of memory from a file, one after the other, from byte `at` on. Raises DamagedCheckpoint and OSError."""
    first = 0
    while first < len(pieces):
        done = os.preadv(descriptor, pieces[first:], at)
        if done == 0:
            raise DamagedCheckpoint(path, f"ends at byte {at:,}, before the tensors that it should hold do")
        at += done
        while first < len(pieces) and done >= len(pieces[first]):
            done -= len(pieces[first])
            first += 1
        if done:
            pieces[first] = pieces[first][done:]
