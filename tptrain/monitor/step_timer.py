"""How long a step takes: start-up, evaluations and checkpoints do not count.

    start()   step()   step()   with paused(): evaluate   step()   take() -> mean seconds of these three steps

On a GPU the caller waits for the device (reading the loss does) before `take`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Mean seconds per step since the last record, and over the whole run.

    clock: seconds from some fixed moment.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: float | None = None
        """When the time that is not yet counted began; None before `start` and inside a pause."""
        self._pauses = 0
        self._seconds, self._steps = 0.0, 0
        self._all_seconds, self._all_steps = 0.0, 0

    def start(self) -> None:
        """Begin to count: called right before the first step, so that start-up is no part of it."""
        self._since = self._clock()

    def step(self) -> None:
        """One more step is done."""
        self._steps += 1
        self._all_steps += 1

    def pause(self) -> None:
        """Leave out the time from here to the matching `resume`."""
        self._count()
        self._pauses += 1
        self._since = None

    def resume(self) -> None:
        """Count again, once every pause has ended."""
        self._pauses -= 1
        if self._pauses == 0:
            self._since = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def take(self) -> float | None:
        """Mean seconds per step since the last `take`, which starts afresh; None where no step was done."""
        self._count()
        mean = self._seconds / self._steps if self._steps else None
        self._seconds, self._steps = 0.0, 0
        return mean

    def overall(self) -> float | None:
        """Mean seconds per step since `start`; None where no step was done."""
        self._count()
        return self._all_seconds / self._all_steps if self._all_steps else None

    def _count(self) -> None:
        """Add the time since the last look."""
        if self._since is None:
            return
        now = self._clock()
        self._seconds += now - self._since
        self._all_seconds += now - self._since
        self._since = now
