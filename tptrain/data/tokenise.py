"""Ranges of documents to shards: in this process for little text, else in several."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from tptrain.data.meta import Shard
from tptrain.data.progress import BuildProgress
from tptrain.data.shards import Range, Work, write_range
from tptrain.data.workers import Workers

_WORTH_SECONDS = 5.0
"""What is left to do must take this long before processes are started, each of which takes a second or two to begin."""


def tokenise(work: Work, ranges: Sequence[Range], num_proc: Any, progress: BuildProgress) -> list[dict[str, Shard]]:
    """Write the shards of all ranges; what each range's splits hold, in the ranges' order.

    num_proc: how many processes; "auto" begins in this one and, where the rest would take long, goes on with one a core.
    """
    done: dict[int, dict[str, Shard]] = {}
    left = list(ranges)
    while left:
        count = min(_processes(num_proc, progress, begun=bool(done)), len(left))
        if count > 1:
            with Workers(work, count) as workers:
                done |= {part.number: shards for part, shards in workers.write(left, progress.add)}
            break
        part = left.pop(0)
        done[part.number] = write_range(work, part, progress.add)
    return [done[part.number] for part in ranges]


def _processes(num_proc: Any, progress: BuildProgress, begun: bool) -> int:
    if num_proc != "auto":
        return int(num_proc)
    if not begun or progress.seconds_left < _WORTH_SECONDS:
        return 1
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
