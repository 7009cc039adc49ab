"""Which layers each stage holds."""

from __future__ import annotations

from itertools import pairwise


def even_partition(layers: int, stages: int) -> list[tuple[int, int]]:
    """Contiguous runs as equal as can be, as (first, one past last). The earlier stages take the extra layers.

    >>> even_partition(7, 2)
    [(0, 4), (4, 7)]
    """
    short, extra = divmod(layers, stages)
    bounds = [stage * short + min(stage, extra) for stage in range(stages + 1)]
    return list(pairwise(bounds))
