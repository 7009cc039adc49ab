"""Which documents are held out for evaluation.

Files are known by their names: a document's place in the order of the names' hashes decides. Rows are known by their
number: a fixed permutation of the numbers decides. Never the run's seed: two runs with different seeds hold out the same
text, so that their validation losses compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tptrain.data.sampler import permute

_KEY = 0x5EED0F5EED0F5EED
"""Of the permutation that holds out rows."""


@dataclass(frozen=True)
class HeldOut:
    """Which of `documents` are held out; small to send to another process, whatever their number."""

    documents: int
    fraction: float
    rows: np.ndarray | None = None
    """Numbers of the documents that are held out, sorted, int64; None where the permutation says it."""

    @property
    def tail(self) -> float:
        """Share of the text that is held out of a lone document, which cannot be held out whole; else 0."""
        return self.fraction if self.documents == 1 else 0.0

    def mask(self, first: int, last: int) -> np.ndarray:
        """Whether documents first .. last - 1 are held out, bool [last - first]."""
        if self.rows is None:
            count = held_count(self.documents, self.fraction)
            return permute(np.arange(first, last), self.documents, _KEY) < count if count else np.zeros(last - first, dtype=bool)
        start, end = np.searchsorted(self.rows, (first, last))
        mask = np.zeros(last - first, dtype=bool)
        mask[self.rows[start:end] - first] = True
        return mask


def hold_out(documents: int, names: Sequence[str] | None, fraction: float) -> HeldOut:
    """The rule for `documents` documents that are files with `names`, or rows (None)."""
    if names is None:
        return HeldOut(documents, fraction)
    chosen = held_out(names, fraction)
    return HeldOut(documents, fraction, np.array([place for place, name in enumerate(names) if name in chosen], dtype=np.int64))


def held_count(documents: int, fraction: float) -> int:
    """How many documents of the validation split there are: `fraction` of them, rounded.

    For a fraction above 0 and two documents or more, each split gets at least one. A lone document is not held out whole.
    """
    if fraction == 0 or documents < 2:
        return 0
    return min(max(1, round(fraction * documents)), documents - 1)


def held_out(names: Sequence[str], fraction: float) -> frozenset[str]:
    """The names of the files of the validation split: `held_count` of them, those with the lowest hashes."""
    return frozenset(sorted(names, key=_hash)[: held_count(len(names), fraction)])


def split_tail(text: str, fraction: float) -> tuple[str, str]:
    """Head and tail of a lone document, the tail being `fraction` of its characters, rounded, and at least one.

    >>> split_tail("abcdefghij", 0.2)
    ('abcdefgh', 'ij')
    """
    cut = len(text) - min(len(text), max(1, round(fraction * len(text))))
    return text[:cut], text[cut:]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
