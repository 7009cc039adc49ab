"""Which part of which tensor a rank has, which of these parts it writes, and where they end up: `tensors.json`.

Every tensor has one key, its parameter's name in the whole model: `model.layers.17.mlp.up.weight` and
`optimizer.layers.17.mlp.up.weight.exp_avg`. It lies on disk as one or more boxes (chunks) that cover it, each in one file:

    {"format": 1, "tensors": {"model.embedding.weight": {"dtype": "float32", "shape": [257, 32], "chunks": [
        {"file": "rank-00000.tensors", "at": 0, "offset": [0, 0], "shape": [129, 32]},
        {"file": "rank-00001.tensors", "at": 0, "offset": [129, 0], "shape": [128, 32]}]}, ...}}

A chunk's values stand in its file from byte `at` on, row by row, little-endian, with nothing between chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

TENSORS_FILE = "tensors.json"
FORMAT = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
}
"""What a tensor's numbers can be, by the name on disk."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: `offset` is its first corner, `size` its lengths. A number has () for both."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its length on disk."""
        return math.prod(self.size) * DTYPES[self.dtype].itemsize


def own_chunk(key: str, tensor: Tensor) -> Chunk:
    """The part of a tensor that is on this rank: of a DTensor what its placements say, without padding, else all."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Chunk(key, dtype, shape, (0,) * len(shape), shape)
    (box,) = tensor.__create_chunk_list__()
    return Chunk(key, dtype, shape, tuple(box.offsets), tuple(box.sizes))


def local_values(tensor: Tensor) -> Tensor:
    """The live values of `own_chunk`."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def writers(chunks: Sequence[Sequence[Chunk]]) -> list[list[Chunk]]:
    """The chunks that each rank writes, given those that each has: each chunk once, by the rank with the least to write so far.

    The large ones are dealt first; in a file those of wider numbers come first, so that each begins at a multiple of its number's width.
    """
    holders: dict[Chunk, list[int]] = {}
    for rank, held in enumerate(chunks):
        for chunk in held:
            if chunk.bytes:
                holders.setdefault(chunk, []).append(rank)
    dealt: list[list[Chunk]] = [[] for _ in chunks]
    load = [0] * len(chunks)
    for chunk in sorted(holders, key=lambda chunk: (-chunk.bytes, chunk.key, chunk.offset)):
        rank = min(holders[chunk], key=lambda rank: (load[rank], rank))
        dealt[rank].append(chunk)
        load[rank] += chunk.bytes
    for mine in dealt:
        mine.sort(key=lambda chunk: -DTYPES[chunk.dtype].itemsize)
    return dealt


def tensors_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.tensors"


def index_of(dealt: Sequence[Sequence[Chunk]]) -> dict[str, Any]:
    """The content of `tensors.json`, given what each rank writes."""
    tensors: dict[str, Any] = {}
    for rank, chunks in enumerate(dealt):
        at = 0
        for chunk in chunks:
            entry = tensors.setdefault(chunk.key, {"dtype": chunk.dtype, "shape": chunk.shape, "chunks": []})
            entry["chunks"].append({"file": tensors_file(rank), "at": at, "offset": chunk.offset, "shape": chunk.size})
            at += chunk.bytes
    return {"format": FORMAT, "tensors": dict(sorted(tensors.items()))}


def live_values(chunks: Sequence[Chunk], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The live values of chunks that this rank has, in their order."""
    return [local_values(tensors[chunk.key]) for chunk in chunks]
