"""Who is there, and who is missing.

Before a job over several nodes its ranks say that they have come, in the store through which they find each other: whom it waits for
in vain is then known by name, and a node whose ranks have failed calls the others' wait off.

Later, a pair's exchange knows its peer. A sum over many ranks that does not end only says that it took too long: each rank waits for
its neighbour on a ring, which waits for its own. So every rank that falls says so in that store, and one that ran into a time limit waits
a moment for the others to do the same. Who stays silent is frozen, or cut off. Where the store itself does not answer, it is the way to
rank 0's machine, which has it, that is cut.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial

from torch.distributed import PrefixStore, Store

from tptrain.store_line import Silent, Unreachable, within

PATIENCE_SECONDS = 5.0
"""How long the others may take to fall as well: ranks enter a sum at different moments of a step."""
FELL = "tptrain/fell"
"""The key by which a node calls off an attempt whose ranks have not all come."""


class Absent(RuntimeError):
    """Ranks have not come. waited_for: the one, where it is one."""

    def __init__(self, missing: Sequence[int], seconds: float) -> None:
        super().__init__(f"timed out after {seconds:g} s of waiting for rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}")
        self.waited_for = missing[0] if len(missing) == 1 else None


def store_of_attempt(store: Store, attempt: int) -> Store:
    """The part of a store in which the ranks of one start find each other."""
    return PrefixStore(f"attempt/{attempt}", store)


def muster(store: Store, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Return once all ranks have come.

    Raises Absent for those that have not within the time given, RuntimeError where a node has called the attempt off or the store is gone.
    """
    end, keys = time.monotonic() + timeout_seconds, [f"tptrain/here/{other}" for other in range(world_size)]
    within(timeout_seconds, lambda: store.set(keys[rank], ""))
    while not within(timeout_seconds, lambda: store.check(keys)):
        if within(timeout_seconds, lambda: store.check([FELL])):
            raise RuntimeError("Connection closed: the ranks of another node have failed before they came")
        if time.monotonic() > end:
            raise Absent([other for other, key in enumerate(keys) if not store.check([key])], timeout_seconds)
        time.sleep(0.05)


def fall(store: Store, rank: int) -> None:
    """Say that `rank` has fallen. A store that cannot be reached is passed over."""
    with contextlib.suppress(Unreachable):
        within(PATIENCE_SECONDS, lambda: store.set(_key(rank), ""))


def missing(store: Store, world_size: int, patience_seconds: float = PATIENCE_SECONDS) -> Sequence[int]:
    """The ranks that have not fallen within the time given: none where all have or the store is gone, rank 0 where it does not answer."""
    end = time.monotonic() + patience_seconds
    silent = list(range(world_size))
    try:
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not within(patience_seconds, partial(store.check, [_key(rank)]))]
            time.sleep(0.05)
    except Silent:
        return [0]
    except Unreachable:
        return []
    return silent


def _key(rank: int) -> str:
    return f"tptrain/fallen/{rank}"
