"""Several ways of doing one thing, timed in turns, so that a noisy machine is noisy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def turns(
    ways: dict[str, Callable[[], object]], rounds: int, warmup: int = 1, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each way in each of `rounds` turns, after `warmup` turns that do not count.

    before: called ahead of each way, untimed; a barrier, where several processes take the same turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            before()
            began = time.perf_counter()
            way()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def alternate(
    ways: dict[str, Callable[[], object]], rounds: int, warmup: int = 1, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of each way over the turns; arguments as in `turns`."""
    return {name: statistics.median(values) for name, values in turns(ways, rounds, warmup, before).items()}


def ratio(slower: list[float], faster: list[float]) -> float:
    """How many times as fast the second way is: the median over the turns of one turn's ratio, in which both met the same noise."""
    return statistics.median(slow / fast for slow, fast in zip(slower, faster, strict=True))
