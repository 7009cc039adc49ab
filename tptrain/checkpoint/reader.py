"""Reads any box of any tensor of a checkpoint, whatever layout wrote it. Nothing but numbers is made of what the files hold.

    stored = StoredTensors(folder)
    stored.shapes["model.embedding.weight"]            (257, 32)
    stored.whole("model.embedding.weight")             a tensor of that shape
    stored.fill("model.embedding.weight", (64, 0), out)   rows from 64 on, as many as `out` has

Files are mapped, so a rank reads the pages of its own boxes and no others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tptrain.checkpoint.chunks import DTYPES, FORMAT, TENSORS_FILE, Chunk, local_values, own_chunk
from tptrain.checkpoint.manifest import DamageError, read_json, read_manifest


@dataclass(frozen=True)
class _Place:
    """A chunk on disk."""

    chunk: Chunk
    file: str
    at: int


class StoredTensors:
    """The tensors of a complete checkpoint. Raises DamageError where `tensors.json` does not fit the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes = {name: note.bytes for name, note in read_manifest(folder).items()}
        self._files: dict[str, Tensor] = {}
        content = read_json(folder / TENSORS_FILE)
        try:
            if content["format"] != FORMAT:
                raise DamageError(f"{folder / TENSORS_FILE} is not of format {FORMAT}")
            self._places = {key: [_place(key, entry, chunk) for chunk in entry["chunks"]] for key, entry in content["tensors"].items()}
            self.shapes: dict[str, tuple[int, ...]] = {key: tuple(map(int, entry["shape"])) for key, entry in content["tensors"].items()}
            self.dtypes: dict[str, torch.dtype] = {key: DTYPES[entry["dtype"]] for key, entry in content["tensors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamageError(f"{folder / TENSORS_FILE} is no list of tensors ({type(error).__name__}: {error})") from None
        for place in (place for places in self._places.values() for place in places):
            self._check(place)

    def whole(self, key: str) -> Tensor:
        """A whole tensor, in the numbers that it has on disk."""
        out = torch.empty(self.shapes[key], dtype=self.dtypes[key])
        self.fill(key, (0,) * out.dim(), out)
        return out

    def fill(self, key: str, offset: Sequence[int], out: Tensor) -> None:
        """Fill `out`, of any dtype and device, with the box of a tensor that begins at `offset` and is as large as `out`.

        Raises DamageError where the chunks on disk do not cover it.
        """
        found = 0
        for place in self._places[key]:
            box = _overlap(offset, out.shape, place.chunk)
            if box is None:
                continue
            source = self._values(place)
            target = out
            for dim, (first, length) in enumerate(box):
                source = source.narrow(dim, first - place.chunk.offset[dim], length)
                target = target.narrow(dim, first - offset[dim], length)
            target.copy_(source)
            found += source.numel()
        if found != out.numel():
            raise DamageError(f"{self.folder / TENSORS_FILE} covers {found:,} of {out.numel():,} numbers of {key}")

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Which of these tensors of a model, by their keys, the checkpoint lacks or has in another shape; None where all fit."""
        wrong = []
        for key, tensor in tensors.items():
            wanted, has = tuple(tensor.shape), self.shapes.get(key)
            if has is None:
                wrong.append(f"no {key}")
            elif has != wanted:
                wrong.append(f"{key} as {list(has)}, not {list(wanted)}")
        if not wrong:
            return None
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"has {', '.join(wrong[:3])}{more}"

    def _values(self, place: _Place) -> Tensor:
        """A chunk's values, mapped: reading one reads its page."""
        if place.file not in self._files:
            self._files[place.file] = torch.from_file(
                str(self.folder / place.file), shared=False, size=self._sizes[place.file], dtype=torch.uint8
            )
        data = self._files[place.file][place.at : place.at + place.chunk.bytes]
        return data.view(DTYPES[place.chunk.dtype]).view(place.chunk.size)

    def _check(self, place: _Place) -> None:
        """Refuse a chunk that lies outside of its tensor or its file, so that no read does."""
        chunk = place.chunk
        inside = len(chunk.shape) == len(chunk.offset) == len(chunk.size) and all(
            first >= 0 and length > 0 and first + length <= whole
            for first, length, whole in zip(chunk.offset, chunk.size, chunk.shape, strict=True)
        )
        aligned = place.at % DTYPES[chunk.dtype].itemsize == 0
        if not inside or not aligned or place.at < 0 or place.at + chunk.bytes > self._sizes.get(place.file, -1):
            raise DamageError(f"{self.folder / TENSORS_FILE} puts a part of {chunk.key} where none can be")


def fill_own(stored: StoredTensors, tensors: Mapping[str, Tensor]) -> None:
    """Fill what this rank has of each tensor. Raises DamageError."""
    for key, tensor in tensors.items():
        chunk = own_chunk(key, tensor)
        if math.prod(chunk.size):
            stored.fill(key, chunk.offset, local_values(tensor))


def _place(key: str, entry: Mapping[str, Any], chunk: Mapping[str, Any]) -> _Place:
    shape, offset, size = (tuple(map(int, numbers)) for numbers in (entry["shape"], chunk["offset"], chunk["shape"]))
    return _Place(Chunk(str(key), _known(entry["dtype"]), shape, offset, size), str(chunk["file"]), int(chunk["at"]))


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is unknown")
    return dtype


def _overlap(offset: Sequence[int], size: Sequence[int], chunk: Chunk) -> list[tuple[int, int]] | None:
    """What a box and a chunk share: (first, length) of each dimension in the whole tensor; None where that is nothing."""
    box = []
    for first, length, chunk_first, chunk_length in zip(offset, size, chunk.offset, chunk.size, strict=True):
        begin, end = max(first, chunk_first), min(first + length, chunk_first + chunk_length)
        if begin >= end:
            return None
        box.append((begin, end - begin))
    return box
