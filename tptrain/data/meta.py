"""What a token store's meta.json says: of what the ids follow, and which files hold them.

The file names every other file of the store with its size, its time and its checksum, and holds a checksum of itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tptrain.data.checksums import FileNote
from tptrain.files import write_atomically

FORMAT = 2
"""Raised whenever the files or the way they are made change; part of the fingerprint."""
SPLITS = ("train", "val")


class StoreError(ValueError):
    """The folder is not a whole token store of this format. The message is one line."""


@dataclass(frozen=True)
class Shard:
    """The ids of one split that come from a range of the source's documents."""

    file: FileNote
    tokens: int
    documents: int
    first: int
    """First document of the range; with `last` what it takes to make the shard again."""
    last: int
    """First document after the range."""


@dataclass(frozen=True)
class SplitMeta:
    """One split: its shards in order, and where its documents start."""

    offsets: FileNote
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Ids in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)


@dataclass(frozen=True)
class Meta:
    """All of it."""

    fingerprint: str
    source: str
    tokenizer: str | None
    vocab_size: int
    end_of_document: int | None
    splits: dict[str, SplitMeta]
    others: tuple[FileNote, ...] = ()
    """Further files: tokenizer.json."""

    @property
    def dtype(self) -> np.dtype:
        """Of the ids: little-endian, two bytes where the vocabulary fits into them."""
        return dtype_of(self.vocab_size)

    @property
    def files(self) -> list[FileNote]:
        """Every file but meta.json and the sums."""
        return [*(split.offsets for split in self.splits.values()), *(shard.file for shard in self.shards), *self.others]

    @property
    def shards(self) -> list[Shard]:
        """The shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def tokens(self) -> int:
        """Ids in all splits."""
        return sum(split.tokens for split in self.splits.values())

    def with_notes(self, change: Callable[[FileNote], FileNote]) -> Meta:
        """The same, with each file's note changed."""
        splits = {
            name: SplitMeta(change(split.offsets), tuple(replace(shard, file=change(shard.file)) for shard in split.shards))
            for name, split in self.splits.items()
        }
        return replace(self, splits=splits, others=tuple(map(change, self.others)))


def dtype_of(vocab_size: int) -> np.dtype:
    """The numbers that ids are stored as.

    >>> dtype_of(65536).str, dtype_of(65537).str
    ('<u2', '<u4')
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_meta(folder: Path, meta: Meta) -> None:
    """Write meta.json, whole or not at all."""
    body = {"format": FORMAT, **asdict(meta)}
    write_atomically(folder / "meta.json", json.dumps({**body, "crc32": _sum(body)}, indent=1).encode())


def read_meta(folder: Path) -> Meta:
    """Raises StoreError where there is none, or it is damaged or of another format."""
    try:
        body = json.loads((folder / "meta.json").read_text("utf-8"))
        if body["format"] != FORMAT:
            raise StoreError(f"{folder} has store format {body['format']}, not {FORMAT}: delete it, and it is built anew")
        if body.pop("crc32") != _sum(body):
            raise StoreError(f"{folder}/meta.json is damaged: start the run again, and the store is built anew")
        del body["format"]
        splits = {name: SplitMeta(FileNote(**part["offsets"]), _shards(part["shards"])) for name, part in body["splits"].items()}
        return Meta(**{**body, "splits": splits, "others": tuple(FileNote(**one) for one in body["others"])})
    except StoreError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder} is no token store: {error}") from error


def _shards(found: list[dict[str, Any]]) -> tuple[Shard, ...]:
    return tuple(Shard(**{**one, "file": FileNote(**one["file"])}) for one in found)


def _sum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
