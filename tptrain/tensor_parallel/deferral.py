"""Weight gradients for later.

The stage before waits for the input's gradient alone. In a schedule that splits the backward, the matrix products that make weight
gradients are left out of it, with the two matrices of each, and made when the rank would else wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Deferral:
    """Shared by the layers of a rank: whether weight gradients are made at once, and what was left for later."""

    def __init__(self) -> None:
        self._left: list[Callable[[], None]] | None = None

    @contextmanager
    def putting_off(self) -> Iterator[list[Callable[[], None]]]:
        """In the block nothing that is given to `do` is done. The list gets it, in order, to be called once each."""
        left: list[Callable[[], None]] = []
        self._left = left
        try:
            yield left
        finally:
            self._left = None

    def do(self, make: Callable[[], None]) -> None:
        """Make a weight gradient, now or later. What `make` holds must not change until then."""
        if self._left is None:
            make()
        else:
            self._left.append(make)
