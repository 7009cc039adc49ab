from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest

from tptrain.pipeline.partition import even_partition, partition

LOOP_2X2, V_2X2, V_3X2, ONE_EACH = [0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 2, 2, 1, 0], [0, 1, 2, 3]
COSTS = [(1, 0, 0), (1, 0, 2), (3, 0, 7), (2, 5, 3), (4, 1, 0), (5, 0, 23)]  # block, first, last


def compositions(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut the layers into that many stages."""
    for cuts in combinations(range(1, layers), stages - 1):
        yield tuple(end - start for start, end in pairwise((0, *cuts, layers)))


def stage_costs(sizes: tuple[int, ...], block: int, first: int, last: int) -> list[int]:
    costs = [size * block for size in sizes]
    costs[0] += first
    costs[-1] += last
    return costs


def by_rank(costs: list[int], ranks: list[int]) -> list[list[int]]:
    return [[cost for cost, holder in zip(costs, ranks, strict=True) if holder == rank] for rank in range(max(ranks) + 1)]


def sizes_of(bounds: list[tuple[int, int]]) -> tuple[int, ...]:
    """Checks that the runs are contiguous and start at layer 0."""
    assert [start for start, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    return tuple(end - start for start, end in bounds)


def test_layers_are_cut_as_numpy_cuts_an_array() -> None:
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            runs = np.array_split(np.arange(layers), stages)  # contiguous, sizes that differ by at most one, longer ones first
            expected = [(run[0], run[-1] + 1) for run in runs]
            assert even_partition(layers, stages) == expected
            assert partition("even", layers, range(stages), block=1, first=2, last=3) == expected


def test_with_equal_stages_balanced_is_even() -> None:
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            assert partition("balanced", layers, range(stages), block=3, first=0, last=0) == even_partition(layers, stages)


@pytest.mark.parametrize("ranks", [[0], [0, 0], [0, 1], ONE_EACH, LOOP_2X2, V_2X2, V_3X2], ids=str)
@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_no_other_partition_is_faster(ranks: list[int], costs: tuple[int, int, int]) -> None:
    """Over every composition: the slowest rank; then, for each rank with its layers as they are, its slowest stage."""
    for layers in range(len(ranks), 12):
        sizes = sizes_of(partition("balanced", layers, ranks, *costs))
        assert sum(sizes) == layers
        assert min(sizes) >= 1
        mine = by_rank(stage_costs(sizes, *costs), ranks)
        loads = [sum(stages) for stages in mine]
        every = [by_rank(stage_costs(other, *costs), ranks) for other in compositions(layers, len(ranks))]
        assert max(loads) == min(max(map(sum, other)) for other in every)
        same_loads = [other for other in every if [sum(stages) for stages in other] == loads]
        for rank, stages in enumerate(mine):
            assert max(stages) == min(max(other[rank]) for other in same_loads)


def test_as_fast_as_a_dynamic_programme_finds() -> None:
    """For sizes beyond brute force, with one stage a rank: the best slowest stage by the recurrence over (stage, layers left)."""
    draw = random.Random(7)
    for _ in range(60):
        stages = draw.randint(2, 12)
        layers = stages + draw.randint(0, 70)
        block, first, last = draw.randint(1, 20), draw.randint(0, 60), draw.randint(0, 200)

        @cache
        def best(stage: int, left: int, block: int = block, first: int = first, last: int = last, stages: int = stages) -> float:
            extra = (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)
            if stage == stages - 1:
                return left * block + extra if left else float("inf")
            return min(
                (max(size * block + extra, best(stage + 1, left - size)) for size in range(1, left)),
                default=float("inf"),
            )

        sizes = sizes_of(partition("balanced", layers, range(stages), block, first, last))
        assert sum(sizes) == layers
        assert max(stage_costs(sizes, block, first, last)) == best(0, layers)


def test_of_equal_partitions_the_earlier_stage_takes_the_layer() -> None:
    assert sizes_of(partition("balanced", 6, ONE_EACH, block=1, first=0, last=0)) == (2, 2, 1, 1)
    assert sizes_of(partition("balanced", 7, LOOP_2X2, block=1, first=0, last=0)) == (2, 2, 2, 1)
    assert sizes_of(partition("balanced", 5, V_2X2, block=1, first=0, last=0)) == (2, 1, 1, 1)


def test_a_list_is_taken_as_it_stands() -> None:
    assert partition([1, 3, 2], 6, [0, 1, 2], block=1, first=0, last=5) == [(0, 1), (1, 4), (4, 6)]
