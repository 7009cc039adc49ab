"""`tensors.json`: which numbers of which tensor stand where in which file, and the checksums of their tiles.

Every tensor has one key, its parameter's name in the whole model: `model.layers.17.mlp.up.weight` and
`optimizer.layers.17.mlp.up.weight.exp_avg`. It lies on disk as boxes (chunks) that together are a grid over it:

    {"format": 1, "tensors": {
    "model.embedding.weight": {"dtype": "float32", "shape": [257, 32], "parts": [1, 1], "chunks": [
        {"file": "rank-00000.tensors", "at": 0, "offset": [0, 0], "size": [129, 32], "xxh3_64": "5a0f...c3"},
        {"file": "rank-00001.tensors", "at": 0, "offset": [129, 0], "size": [128, 32], "xxh3_64": "90be...17"}]},
    ...}}

`parts` says how finely a tensor is cut into tiles (tiles.py). A chunk's tiles stand in its file from byte `at` on, one after the other,
little-endian; `xxh3_64` has 16 hex digits for each.

Whatever is read here may be spoilt or made by an enemy: nothing of it is believed before it is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tptrain.checkpoint.manifest import DamagedCheckpoint, file_size, read_json
from tptrain.checkpoint.tiles import Tile, grid, tiles_of
from tptrain.files import write_atomically

TENSORS_FILE = "tensors.json"
FORMAT = 1
CHECKSUM_DIGITS = 16
_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPES}
"""What a tensor's numbers can be, by the name on disk."""
_PARTS = {1 << power for power in range(13)}
_FILE = re.compile(r"rank-\d{5,}\.tensors")
_DIGITS = re.compile(r"[0-9a-f]*")


def tensors_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.tensors"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it is on disk."""

    file: str
    at: int
    offset: tuple[int, ...]
    size: tuple[int, ...]
    checksums: str
    """Those of its tiles, one after the other."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    """For how many ranks each dimension is cut into tiles."""
    chunks: dict[tuple[int, ...], Chunk]
    """By their offsets."""

    def tiles(self, chunk: Chunk) -> list[Tile]:
        """The tiles of one of its chunks."""
        return tiles_of(grid(self.shape, self.parts, chunk.offset, chunk.size), self.dtype.itemsize)


def write_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write `tensors.json`, a line a tensor. Raises OSError."""
    lines = []
    for key, tensor in sorted(tensors.items()):
        chunks = [
            {"file": chunk.file, "at": chunk.at, "offset": chunk.offset, "size": chunk.size, "xxh3_64": chunk.checksums}
            for _, chunk in sorted(tensor.chunks.items())
        ]
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry = {"dtype": dtype, "shape": tensor.shape, "parts": tensor.parts, "chunks": chunks}
        lines.append(f"{json.dumps(key)}: {json.dumps(entry)}")
    text = ",\n".join(lines)
    write_atomically(folder / TENSORS_FILE, f'{{"format": {FORMAT}, "tensors": {{\n{text}\n}}}}\n'.encode())


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by their keys. Raises DamagedCheckpoint where `tensors.json` is wrong or does not fit the files."""
    path = folder / TENSORS_FILE
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("tensors"), dict):
        raise DamagedCheckpoint(path, f"is no list of tensors of format {FORMAT}")
    sizes: dict[str, int] = {}
    found: dict[str, StoredTensor] = {}
    for key, entry in content["tensors"].items():
        try:
            found[key] = _tensor(entry)
        except _Wrong as wrong:
            raise DamagedCheckpoint(path, f"is wrong about {key!r}: {wrong}") from None
        for chunk in found[key].chunks.values():
            if chunk.file not in sizes:
                sizes[chunk.file] = file_size(folder / chunk.file)
            end = chunk.at + math.prod(chunk.size) * found[key].dtype.itemsize
            if end > sizes[chunk.file]:
                rule = f"has {sizes[chunk.file]:,} bytes, but {TENSORS_FILE} has a part of {key!r} end at byte {end:,}"
                raise DamagedCheckpoint(folder / chunk.file, rule)
    return found


class _Wrong(Exception):
    """What of an entry cannot be."""


def _tensor(entry: Any) -> StoredTensor:
    """An entry, checked."""
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES:
        raise _Wrong("an unknown dtype")
    shape, parts = _numbers(entry.get("shape"), "shape"), _numbers(entry.get("parts"), "parts")
    if 0 in shape:
        raise _Wrong("an empty shape")
    if len(parts) != len(shape) or not all(number in _PARTS for number in parts):
        raise _Wrong("wrong parts")
    listed = entry.get("chunks")
    if not isinstance(listed, list):
        raise _Wrong("no chunks")
    chunks = [_chunk(chunk, len(shape)) for chunk in listed]
    tensor = StoredTensor(DTYPES[entry["dtype"]], shape, parts, {chunk.offset: chunk for chunk in chunks})
    if len(tensor.chunks) != len(chunks) or not _is_grid(tensor):
        raise _Wrong(f"chunks that do not cover {list(shape)} once")
    if any(chunk.at % tensor.dtype.itemsize for chunk in chunks):
        raise _Wrong("a chunk that begins within a number")
    counts = [math.prod(len(edges) - 1 for edges in grid(shape, parts, chunk.offset, chunk.size)) for chunk in chunks]
    if any(len(chunk.checksums) != CHECKSUM_DIGITS * count for chunk, count in zip(chunks, counts, strict=True)):
        raise _Wrong("too many or too few checksums")
    return tensor


def _chunk(entry: Any, dims: int) -> Chunk:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not _FILE.fullmatch(entry["file"]):
        raise _Wrong("no name of a file for a chunk")
    offset, size = _numbers(entry.get("offset"), "offset"), _numbers(entry.get("size"), "size")
    (at,) = _numbers([entry.get("at")], "at")
    checksums = entry.get("xxh3_64")
    if len(offset) != dims or len(size) != dims or 0 in size:
        raise _Wrong("a wrong offset or size of a chunk")
    if not isinstance(checksums, str) or not _DIGITS.fullmatch(checksums):
        raise _Wrong("wrong checksums")
    return Chunk(entry["file"], at, offset, size, checksums)


def _numbers(value: Any, name: str) -> tuple[int, ...]:
    """A list of whole numbers that are not negative."""
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 1 << 62 for number in value):
        raise _Wrong(f"a wrong {name}")
    return tuple(value)


def _is_grid(tensor: StoredTensor) -> bool:
    """Whether the chunks are a grid that covers the tensor: as many as cells, and each as long as it is to the next in every dimension.

    Ranks split dimensions, so chunks that somebody has saved are one, and none overlap or are missing.
    """
    starts = [sorted(set(firsts)) for firsts in zip(*tensor.chunks, strict=True)]
    if len(tensor.chunks) != math.prod(map(len, starts)) or any(firsts[0] != 0 for firsts in starts):
        return False
    ends = [dict(zip(firsts, [*firsts[1:], whole], strict=True)) for firsts, whole in zip(starts, tensor.shape, strict=True)]
    return all(
        first + length == end[first]
        for chunk in tensor.chunks.values()
        for first, length, end in zip(chunk.offset, chunk.size, ends, strict=True)
    )
