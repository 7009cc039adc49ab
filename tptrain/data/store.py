"""The token store: all ids of a data set on disk, read by memory map.

    python_docs-5f0c.../
        meta.json        format, fingerprint, source, tokenizer, vocab_size, end_of_document, dtype, counts of each split
        train.tokens     ids of all training documents, one after the other, little-endian uint16 or uint32
        train.offsets    int64 [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
        val.tokens       the same for the documents that are held out
        val.offsets

A store is whole or absent. It is written in a hidden folder beside its place, made durable, and renamed last, so that
a builder that dies leaves only a hidden folder, which nobody opens and which may be deleted; of two builders that
start together one renames first and the other uses that store.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from tptrain.files import sync_folder

FORMAT = 1
"""Raised whenever the files or the way they are made change; part of the fingerprint."""
SPLITS = ("train", "val")


class StoreError(ValueError):
    """The folder is not a whole token store of this format."""


@dataclass(frozen=True)
class Split:
    """The documents of one split."""

    tokens: np.ndarray
    """uint16 or uint32 [num_tokens], memory-mapped; each document's last id is the end-of-document id, if there is one."""
    offsets: np.ndarray
    """int64 [num_documents + 1]: where documents start, and at last num_tokens."""

    @property
    def num_tokens(self) -> int:
        """Ids in this split."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in this split."""
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Ids of document `index`, a view of the map, with its end-of-document id. Raises IndexError beyond the last."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class TokenStore:
    """An opened store."""

    folder: Path
    fingerprint: str
    """Hash of all that the ids follow from."""
    source: str
    """python_docs, text or memorize."""
    tokenizer: str | None
    """Name of the tokenizer; None where the ids stand for no text."""
    vocab_size: int
    """Every id is below it."""
    end_of_document: int | None
    """Id that follows each document; None where the ids stand for no text."""
    train: Split
    val: Split

    @classmethod
    def open(cls, folder: Path | str) -> TokenStore:
        """Map the store in `folder`, in milliseconds. Raises StoreError where it is missing, damaged or of another format."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            if meta["format"] != FORMAT:
                raise StoreError(f"{folder} has store format {meta['format']}, not {FORMAT}: delete it, and it is built anew")
            train, val = (_map_split(folder, name, meta["dtype"], meta["splits"][name]) for name in SPLITS)
            fields = {key: meta[key] for key in ("fingerprint", "source", "tokenizer", "vocab_size", "end_of_document")}
        except StoreError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder} is no token store: {error}") from error
        return cls(folder=folder, train=train, val=val, **fields)

    def split(self, name: str) -> Split:
        """`train` or `val`. Raises KeyError for another name."""
        return {"train": self.train, "val": self.val}[name]


def _map_split(folder: Path, name: str, dtype: str, counts: dict[str, int]) -> Split:
    return Split(
        tokens=_map(folder / f"{name}.tokens", np.dtype(dtype), counts["tokens"]),
        offsets=_map(folder / f"{name}.offsets", np.dtype("<i8"), counts["documents"] + 1),
    )


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """A read-only map of `count` numbers. Raises StoreError for a file of another size."""
    wanted_bytes, found_bytes = count * dtype.itemsize, path.stat().st_size
    if found_bytes != wanted_bytes:
        raise StoreError(f"{path} has {found_bytes} bytes, not {count} x {dtype.itemsize} = {wanted_bytes}")
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)  # an empty file cannot be mapped


class StoreWriter:
    """Writes one store: `append` documents, then `finish`. As a context manager, it clears up where `finish` is not reached.

        with StoreWriter(folder, fingerprint, ...) as writer:
            writer.append("train", ids)
            store = writer.finish()

    Raises OSError where the folder beside `folder` cannot be made.
    """

    def __init__(
        self, folder: Path, fingerprint: str, source: str, tokenizer: str | None, vocab_size: int, end_of_document: int | None
    ) -> None:
        self.folder = folder
        self.building = folder.parent / f".building-{folder.name}-{uuid.uuid4().hex}"
        self.building.mkdir(parents=True)
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._meta = {
            "format": FORMAT, "fingerprint": fingerprint, "source": source, "tokenizer": tokenizer, "vocab_size": vocab_size,
            "end_of_document": end_of_document, "dtype": self._dtype.str,
        }  # fmt: skip
        self._vocab_size = vocab_size
        self._files = {name: open(self.building / f"{name}.tokens", "wb", buffering=1 << 20) for name in SPLITS}  # noqa: SIM115
        self._offsets = {name: array("q", [0]) for name in SPLITS}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk: the error that ended the block is the one to show
                file.close()
        shutil.rmtree(self.building, ignore_errors=True)

    def append(self, split: str, ids: np.ndarray) -> None:
        """Add one document's ids [n], its end-of-document id included. Raises ValueError for an id that is not below vocab_size."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise ValueError(f"ids {ids.min()}..{ids.max()} are not all in range({self._vocab_size})")
        self._files[split].write(ids.astype(self._dtype).tobytes())
        self._offsets[split].append(self._offsets[split][-1] + len(ids))

    def finish(self) -> TokenStore:
        """Make all of it durable, give it its name, and open it; where another builder was first, open that one's store."""
        for name in SPLITS:
            _make_durable(self._files[name])
            with open(self.building / f"{name}.offsets", "wb") as file:
                file.write(np.asarray(self._offsets[name], dtype="<i8").tobytes())
                _make_durable(file)
        counts = {name: {"tokens": offsets[-1], "documents": len(offsets) - 1} for name, offsets in self._offsets.items()}
        with open(self.building / "meta.json", "wb") as file:
            file.write(json.dumps({**self._meta, "splits": counts}, indent=2).encode())
            _make_durable(file)
        sync_folder(self.building)
        self._install()
        sync_folder(self.folder.parent)
        return TokenStore.open(self.folder)

    def _install(self) -> None:
        """Rename the finished folder into place."""
        try:
            os.rename(self.building, self.folder)
        except OSError:
            if is_store(self.folder, str(self._meta["fingerprint"])):
                return  # another builder was first
            damaged = self.building.with_name(self.building.name + "-damaged")
            os.rename(self.folder, damaged)
            os.rename(self.building, self.folder)
            shutil.rmtree(damaged, ignore_errors=True)


def is_store(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` is a whole store with this fingerprint."""
    try:
        return TokenStore.open(folder).fingerprint == fingerprint
    except StoreError:
        return False


def _make_durable(file: BinaryIO) -> None:
    """Flush, fsync and close an open file."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
