"""Several ways of doing one thing, timed in turns, so that a noisy machine is noisy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def alternate(
    ways: dict[str, Callable[[], object]], rounds: int, warmup: int = 1, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of each way over `rounds` turns, after `warmup` turns that do not count.

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
    return {name: statistics.median(values) for name, values in seconds.items()}
