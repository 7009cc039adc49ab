"""Who is missing: asked when ranks start, and once a rank has lost another in a communication.

A pair's exchange knows its peer. A sum over many ranks that does not end only says that it took too long: each rank waits for
its neighbour on a ring, which waits for its own. So every rank that falls says so in the store through which the ranks found
each other, and one that lost another waits a moment for the others to do the same. Who stays silent is frozen, or cut off.

Whoever starts the ranks ends all of them as soon as one has left. So who ran into a time limit, and can name the silent, has to leave
before who only saw a connection break, as connections do that a time limit has ended: the latter waits twice as long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE_SECONDS = 5.0
"""How long the others may take to fall as well: ranks enter a sum at different moments of a step."""


def arrive(store: Store, rank: int, world_size: int, limit_seconds: float) -> None:
    """Say that `rank` has started, and return once all have. Raises RuntimeError, which names those that have not, after the limit."""
    arrived = [f"tptrain/arrived/{each}" for each in range(world_size)]
    store.set(arrived[rank], "")
    try:
        store.wait(arrived, timedelta(seconds=limit_seconds))
    except RuntimeError as error:
        late = [str(each) for each, key in enumerate(arrived) if not store.check([key])]
        raise RuntimeError(f"timed out: rank{'s' * (len(late) > 1)} {', '.join(late)} did not start within {limit_seconds:g} s") from error


def fall(store: Store, rank: int) -> None:
    """Say that `rank` has fallen. A store that cannot be reached is passed over."""
    try:
        store.set_timeout(timedelta(seconds=PATIENCE_SECONDS))
        store.set(_key(rank), "")
    except RuntimeError:
        pass


def missing(store: Store, world_size: int, patience_seconds: float, known: Sequence[int] = ()) -> Sequence[int]:
    """The ranks that have not fallen within the time given: none where all have, or where the store cannot be reached.

    known: ranks that are not waited for, as they are known to be missing.
    """
    end = time.monotonic() + patience_seconds
    silent = list(range(world_size))
    try:
        while {*silent} - {*known} and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([_key(rank)])]
            time.sleep(0.05)
    except RuntimeError:
        return []
    return silent


def _key(rank: int) -> str:
    return f"tptrain/fallen/{rank}"
