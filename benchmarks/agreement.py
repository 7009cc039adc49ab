"""How far two rankings of the same things agree."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """The share of pairs that both rank alike, less the share that they rank the other way round (Kendall 1938): from 1 to -1.

    Nothing may be ranked equal to something else.

    >>> kendall_tau([1, 2, 3], [10, 30, 20])
    0.3333333333333333
    """
    values = [value for _, value in sorted(zip(one, other, strict=True))]
    seen: list[float] = []
    reversed_pairs = 0
    for value in values:
        reversed_pairs += len(seen) - bisect_right(seen, value)
        insort(seen, value)
    pairs = len(values) * (len(values) - 1) // 2
    return 1 - 2 * reversed_pairs / pairs
