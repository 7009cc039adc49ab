"""What is in a split of a token store, counted a piece at a time: memory does not grow with its tokens or documents.

Of lengths only the distinct ones are kept, each with its documents: n tokens have at most sqrt(2 n) of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tptrain.data import Split

_IDS_AT_ONCE = 1 << 22
_DOCUMENTS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Lengths:
    """How many documents have how many tokens, each with the id that ends it."""

    tokens: np.ndarray
    """The lengths that occur, rising, int64 [k]."""
    documents: np.ndarray
    """Documents of each, int64 [k]."""

    @property
    def mean(self) -> float:
        """Tokens a document; 0 where there is none."""
        total = int(self.documents.sum())
        return float(self.tokens @ self.documents) / total if total else 0.0

    @property
    def median(self) -> float:
        """Of an even number of documents half way between the middle two; 0 where there is none."""
        ends = np.cumsum(self.documents)
        if not len(ends):
            return 0.0
        middle = [(int(ends[-1]) - 1) // 2, int(ends[-1]) // 2]
        return float(self.tokens[np.searchsorted(ends, middle, side="right")].mean())

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 where there is none."""
        return int(self.tokens[-1]) if len(self.tokens) else 0


@dataclass(frozen=True)
class Counts:
    """What is in a split."""

    lengths: Lengths
    tokens: int
    ids_used: int
    """How many ids occur."""
    vocab_size: int

    @property
    def documents(self) -> int:
        """Documents in it."""
        return int(self.lengths.documents.sum())


def count(split: Split, vocab_size: int) -> Counts:
    """Read all of a split. Raises StoreError for damage."""
    return Counts(count_lengths(split.offsets), split.num_tokens, count_ids(split, vocab_size), vocab_size)


def count_lengths(offsets: np.ndarray) -> Lengths:
    """The lengths of documents that start and end at `offsets`, int64 [documents + 1].

    >>> lengths = count_lengths(np.array([0, 5, 7, 12]))
    >>> lengths.tokens.tolist(), lengths.documents.tolist()
    ([2, 5], [1, 2])
    """
    tokens, documents = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in range(0, len(offsets) - 1, _DOCUMENTS_AT_ONCE):
        found, times = np.unique(np.diff(offsets[first : first + _DOCUMENTS_AT_ONCE + 1]), return_counts=True)
        tokens, places = np.unique(np.concatenate([tokens, found]), return_inverse=True)
        added = np.zeros(len(tokens), np.int64)
        np.add.at(added, places, np.concatenate([documents, times]))
        documents = added
    return Lengths(tokens, documents)


def count_ids(split: Split, vocab_size: int) -> int:
    """How many of range(vocab_size) occur in a split."""
    seen = np.zeros(vocab_size, dtype=bool)
    for first in range(0, split.num_tokens, _IDS_AT_ONCE):
        seen |= np.bincount(split.tokens[first : first + _IDS_AT_ONCE], minlength=vocab_size) > 0
    return int(seen.sum())
