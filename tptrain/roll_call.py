"""Who is missing: asked once a rank has waited in vain in a communication of many ranks.

A pair's exchange knows its peer. A sum over many ranks that does not end only says that it took too long: each rank waits for
its neighbour on a ring, which waits for its own. So every rank that falls says so in the store through which the ranks found
each other, and one that ran into a time limit waits a moment for the others to do the same. Who stays silent is frozen, or cut off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store

PATIENCE_SECONDS = 5.0
"""How long the others may take to fall as well: ranks enter a sum at different moments of a step."""


def fall(store: Store, rank: int) -> None:
    """Say that `rank` has fallen. A store that cannot be reached is passed over."""
    try:
        store.set_timeout(timedelta(seconds=PATIENCE_SECONDS))
        store.set(_key(rank), "")
    except RuntimeError:
        pass


def missing(store: Store, world_size: int, patience_seconds: float = PATIENCE_SECONDS) -> Sequence[int]:
    """The ranks that have not fallen within the time given: none where all have, or where the store cannot be reached."""
    end = time.monotonic() + patience_seconds
    silent = list(range(world_size))
    try:
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([_key(rank)])]
            time.sleep(0.05)
    except RuntimeError:
        return []
    return silent


def _key(rank: int) -> str:
    return f"tptrain/fallen/{rank}"
