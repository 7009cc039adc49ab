"""Operations on a store of `torch.distributed` that end in time, whatever becomes of the network.

A store's own time limit counts for what waits for a key. Whether a key is there is asked and answered without one: with the link cut the
question waits until the link is back, or the system gives the connection up after a quarter of an hour. So each operation runs
in a thread, which is left behind where it takes too long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")


class Unreachable(RuntimeError):
    """The store did not answer in time, or is gone. The message is one line."""


class Silent(Unreachable):
    """It did not answer in time."""


def within(seconds: float, operation: Callable[[], T]) -> T:
    """The operation's value. Raises Unreachable where it fails, Silent where it takes longer, in a thread that then goes on."""
    ends: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            ends.append((True, operation()))
        except Exception as error:
            ends.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ends:
        raise Silent(f"the store did not answer within {seconds:g} s")
    good, value = ends[0]
    if not good:
        raise Unreachable(f"the store is gone: {str(value).splitlines()[0]}") from value
    result: T = value
    return result


class StoreLine:
    """A connection to a store, made anew after each operation that failed."""

    def __init__(self, connect: Callable[[], Store], seconds: float = 5.0) -> None:
        """seconds: the limit of an operation, in which a connection is made too if need be."""
        self._connect, self._seconds = connect, seconds
        self._store: Store | None = None

    def do(self, operation: Callable[[Store], T]) -> T:
        """The operation's value on the store. Raises Unreachable."""

        def run() -> tuple[Store, T]:
            store = self._store or self._connect()
            return store, operation(store)

        try:
            self._store, value = within(self._seconds, run)
        except Unreachable:
            self._store = None
            raise
        return value
