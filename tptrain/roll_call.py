"""Who is missing: asked when ranks start, and once a rank has lost another in a communication.

A pair's exchange knows its peer. A sum over many ranks that does not end only says that it took too long: each rank waits for
its neighbour on a ring, which waits for its own. So every rank that falls says so in the store through which the ranks found
each other, and one that lost another waits a moment for the others to do the same. Who stays silent is frozen, or cut off. Where the
store itself does not answer, it is the way to rank 0's machine, which has it, that is cut.

Whoever starts the ranks ends all of them as soon as one has left. So who ran into a time limit, and can name the silent, has to leave
before who only saw a connection break, as connections do that a time limit has ended: the latter waits twice as long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tptrain.store_line import Silent, Unreachable, within

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE_SECONDS = 5.0
"""How long the others may take to fall as well: ranks enter a sum at different moments of a step."""
FELL = "tptrain/fell"
"""The key by which a node calls off an attempt whose ranks have not all come."""


def store_of_attempt(store: Store, attempt: int) -> Store:
    """The part of a store in which the ranks of one start find each other."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"attempt/{attempt}", store)


def arrive(store: Store, rank: int, world_size: int, limit_seconds: float) -> None:
    """Say that `rank` has started, and return once all have.

    Raises RuntimeError, which names those that have not, after the limit; also where a node has called it off or the store is gone.
    """
    arrived = [f"tptrain/arrived/{each}" for each in range(world_size)]
    end, pause = time.monotonic() + limit_seconds, 0.01
    within(limit_seconds, partial(store.set, arrived[rank], ""))
    while not within(limit_seconds, partial(store.check, arrived)):
        if store.check([FELL]):
            raise RuntimeError("Connection closed: ranks of another node have failed before they started")
        if time.monotonic() > end:
            late = [str(each) for each, key in enumerate(arrived) if not store.check([key])]
            raise RuntimeError(f"timed out: rank{'s' * (len(late) > 1)} {', '.join(late)} did not start within {limit_seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def fall(store: Store, rank: int) -> None:
    """Say that `rank` has fallen. A store that cannot be reached is passed over."""
    with contextlib.suppress(Unreachable):
        within(PATIENCE_SECONDS, lambda: store.set(_key(rank), ""))


def missing(store: Store, world_size: int, patience_seconds: float, known: Sequence[int] = ()) -> Sequence[int]:
    """The ranks that have not fallen within the time given: none where all have or the store is gone, rank 0 where it does not answer.

    known: ranks that are not waited for, as they are known to be missing.
    """
    end = time.monotonic() + patience_seconds
    silent = list(range(world_size))
    try:
        while {*silent} - {*known} and time.monotonic() < end:
            silent = [rank for rank in silent if not within(PATIENCE_SECONDS, partial(store.check, [_key(rank)]))]
            time.sleep(0.05)
    except Silent:
        return [0]
    except Unreachable:
        return []
    return silent


def _key(rank: int) -> str:
    return f"tptrain/fallen/{rank}"
