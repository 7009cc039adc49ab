"""Which layers each stage holds.

Blocks all cost the same, but the last stage also has the head, which with a large vocabulary costs as much as several of them. A
stage with fewer blocks makes up for it: a pipeline is as slow as its slowest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def partition(kind: str | list[int], layers: int, ranks: Sequence[int], block: float, first: float, last: float) -> list[tuple[int, int]]:
    """The layers of each stage, as (first, one past last): contiguous, at least one.

    kind: balanced, even, or the layers of each stage as a list. ranks: of each stage. block, first, last: what a block costs, and what
    the first and the last stage cost on top of their blocks, in one unit.

    >>> partition("balanced", 8, [0, 1, 2, 3], block=1, first=0, last=2)
    [(0, 3), (3, 5), (5, 7), (7, 8)]
    >>> partition([1, 2], 3, [0, 1], block=1, first=0, last=0)
    [(0, 1), (1, 3)]
    """
    if kind == "even":
        return even_partition(layers, len(ranks))
    if kind == "balanced":
        return _cut(_balanced_sizes(layers, ranks, block, first, last))
    assert isinstance(kind, list)
    assert (len(kind), sum(kind)) == (len(ranks), layers)
    return _cut(kind)


def even_partition(layers: int, stages: int) -> list[tuple[int, int]]:
    """Contiguous runs as equal as can be, as (first, one past last). The earlier stages take the extra layers.

    >>> even_partition(7, 2)
    [(0, 4), (4, 7)]
    """
    short, extra = divmod(layers, stages)
    return _cut([short + (stage < extra) for stage in range(stages)])


def _balanced_sizes(layers: int, ranks: Sequence[int], block: float, first: float, last: float) -> list[int]:
    """Layers of each stage such that the slowest rank is as fast as can be, and then the slowest stage of each rank.

    Each stage has one block; every other goes to the least loaded rank, and there to the least loaded stage, of equals to the earlier.
    No division does better: were a block to lift its rank, the least loaded, above the best division's slowest, then no rank had
    room for one more below that, so the best division would hold fewer blocks than there are. Stages of one rank: the same.
    """
    assert layers >= len(ranks)
    stages_of: dict[int, list[int]] = {}
    for stage, rank in enumerate(ranks):
        stages_of.setdefault(rank, []).append(stage)
    sizes = [1] * len(ranks)

    def cost(stage: int) -> float:
        return sizes[stage] * block + (first if stage == 0 else 0) + (last if stage == len(ranks) - 1 else 0)

    for _ in range(layers - len(ranks)):
        stages = min(stages_of.values(), key=lambda stages: sum(map(cost, stages)))
        sizes[min(stages, key=cost)] += 1
    return sizes


def _cut(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of these lengths, one after another."""
    return list(pairwise(accumulate(sizes, initial=0)))
