"""Kendall's tau against a sort that counts its swaps."""

from __future__ import annotations

import random

import pytest

from benchmarks.agreement import kendall_tau


def swaps(values: list[float]) -> int:
    """Exchanges of neighbours that sort the values: one for each pair that stands the wrong way round."""
    values, count = list(values), 0
    for _ in values:
        for place in range(len(values) - 1):
            if values[place] > values[place + 1]:
                values[place], values[place + 1] = values[place + 1], values[place]
                count += 1
    return count


@pytest.mark.parametrize("seed", range(5))
def test_kendall_is_the_swaps_of_a_sort(seed: int) -> None:
    generator = random.Random(seed)
    one, other = ([generator.random() for _ in range(9)] for _ in range(2))
    by_the_first = [value for _, value in sorted(zip(one, other, strict=True))]
    assert kendall_tau(one, other) == pytest.approx(1 - 2 * swaps(by_the_first) / (9 * 8 / 2))
    assert kendall_tau(one, one) == 1
    assert kendall_tau(one, [-value for value in one]) == -1


def test_equals_count_for_nothing() -> None:
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 3)
    assert kendall_tau([1, 1], [1, 2]) == 0
