"""Which documents are held out for evaluation.

A document's place in the order of hashes of the names decides, never the run's seed: two runs with different seeds
hold out the same text, so that their validation losses compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def held_out(names: Sequence[str], fraction: float) -> frozenset[str]:
    """The names of the documents of the validation split: `fraction` of them, rounded, those with the lowest hashes.

    For a fraction above 0 and two documents or more, each split gets at least one. None for a fraction of 0. A single
    document cannot be held out whole: then `build` holds out its tail (`split_tail`), and this is empty.
    """
    if fraction == 0 or len(names) < 2:
        return frozenset()
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    return frozenset(sorted(names, key=_hash)[:count])


def split_tail(text: str, fraction: float) -> tuple[str, str]:
    """Head and tail of a lone document, the tail being `fraction` of its characters, rounded, and at least one.

    >>> split_tail("abcdefghij", 0.2)
    ('abcdefgh', 'ij')
    """
    cut = len(text) - min(len(text), max(1, round(fraction * len(text))))
    return text[:cut], text[cut:]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
