"""The token store: all ids of a data set on disk, read by memory map.

    python_docs-5f0c.../
        meta.json                fingerprint, source, tokenizer, vocab_size, end_of_document; each file's size, time and checksum
        train-00000.tokens       ids of the training documents among the source's first, little-endian uint16 or uint32
        train-00001.tokens       ... of the next range of documents: about 64 MB of text, or less
        val-00000.tokens         the same for the documents that are held out
        train.offsets            int64 [documents + 1]: document i is ids[offsets[i] : offsets[i + 1]], counted over all shards
        val.offsets
        *.sums                   beside each of these files: the crc32 of every 64 KiB
        tokenizer.json           where the tokenizer has one

A store is whole or absent: `build` makes it in a hidden folder beside its place and renames it last. What is damaged later is
found when it is read (`tokens`) or at the next start (`repair`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tptrain.data.meta import FORMAT, SPLITS, Meta, SplitMeta, StoreError, read_meta
from tptrain.data.tokens import Tokens, read_offsets

__all__ = ["FORMAT", "SPLITS", "Split", "StoreError", "TokenStore", "Tokens"]


class Split:
    """The documents of one split."""

    def __init__(self, folder: Path, meta: SplitMeta, dtype: np.dtype) -> None:
        self._folder, self._meta = folder, meta
        self.tokens = Tokens(folder, meta.shards, dtype)
        self.num_documents = meta.documents

    @property
    def num_tokens(self) -> int:
        """Ids in this split."""
        return len(self.tokens)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_documents + 1], memory-mapped: where documents start, and at last num_tokens. Raises StoreError."""
        return read_offsets(self._folder, self._meta.offsets)

    def document(self, index: int) -> np.ndarray:
        """Ids of document `index`, with its end-of-document id. Raises IndexError beyond the last, StoreError for damage."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]


@dataclass(frozen=True)
class TokenStore:
    """An opened store."""

    folder: Path
    fingerprint: str
    """Hash of all that the ids follow from."""
    source: str
    """python_docs, text, jsonl, ... or memorize."""
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
        """The store in `folder`, in milliseconds: no shard is touched before it is read.

        Raises StoreError where there is none, or its meta.json is damaged or of another format.
        """
        return cls.of(Path(folder), read_meta(Path(folder)))

    @classmethod
    def of(cls, folder: Path, meta: Meta) -> TokenStore:
        """The store in `folder` whose meta.json was read already."""
        train, val = (Split(folder, meta.splits[name], meta.dtype) for name in SPLITS)
        return cls(folder, meta.fingerprint, meta.source, meta.tokenizer, meta.vocab_size, meta.end_of_document, train, val)
