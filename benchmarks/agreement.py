"""How far two rankings of the same things agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """The share of pairs that both rank alike, less the share that they rank the other way round (Kendall 1938): from 1 to -1. A pair that
    either ranks equal counts as neither.

    >>> kendall_tau([1, 2, 3], [10, 30, 20])
    0.3333333333333333
    """
    pairs = list(combinations(zip(one, other, strict=True), 2))
    return sum(_sign(a - c) * _sign(b - d) for (a, b), (c, d) in pairs) / len(pairs)


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)
