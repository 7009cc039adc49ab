"""Reads the next batches while the step computes.

One thread reads ahead, a few batches at most, so that whoever reads from the source is always that thread. A request for
other samples than those that are due (after a resume, with another batch size) throws away what was read and begins anew.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np

from tptrain.data.rows import Rows

_DEPTH = 4
"""Batches that wait to be taken, at most."""


class Prefetch:
    """Rows like those of `source`, read before they are asked for.

    stride: from the first sample of one request to the first of the next, the global batch. An error of the source is raised
    by the request whose samples it is about. Nothing is read before the first request, or `begin`.
    """

    def __init__(self, source: Rows, stride: int) -> None:
        self.source, self.samples_per_epoch = source, source.samples_per_epoch
        self._stride = stride
        self._changed = threading.Condition()
        self._due: tuple[int, int] | None = None
        """First sample and count of the request that is expected next; None before the first, after an error and in the end."""
        self._ready: deque[np.ndarray | BaseException] = deque()
        self._turn = 0
        """Counts the new beginnings: what was read for an earlier one is thrown away."""
        self._thread: threading.Thread | None = None
        self._closed = False
        self._waited_seconds, self._requests = 0.0, 0

    def begin(self, first: int, count: int) -> None:
        """Start to read samples first .. first + count - 1, and those of the requests that would follow."""
        with self._changed:
            self._begin(first, count)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Global samples first .. first + count - 1, int64 [count, seq_len + 1]; waits where they are not read yet."""
        started = time.perf_counter()
        with self._changed:
            if self._due != (first, count):
                self._begin(first, count)
            while not self._ready:
                self._changed.wait()
            found = self._ready.popleft()
            self._due = None if isinstance(found, BaseException) else (first + self._stride, count)
            self._changed.notify_all()
        self._waited_seconds += time.perf_counter() - started
        self._requests += 1
        if isinstance(found, BaseException):
            raise found
        return found

    def take_wait_seconds(self) -> float:
        """Mean seconds that a request took since this was last asked; 0 where there was none."""
        mean = self._waited_seconds / self._requests if self._requests else 0.0
        self._waited_seconds, self._requests = 0.0, 0
        return mean

    def close(self) -> None:
        """Stop reading; a second call does nothing. Waits a moment for the thread, which is no reason for a process to stay."""
        with self._changed:
            self._closed, self._due = True, None
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _begin(self, first: int, count: int) -> None:
        """With the lock held."""
        if self._closed:
            raise RuntimeError("this reader is closed")
        self._due = first, count
        self._turn += 1
        self._ready.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _read(self) -> None:
        """The thread: whenever there is room, the batch after the last that was read."""
        while True:
            with self._changed:
                while not self._closed and not self._has_room():
                    self._changed.wait()
                if self._closed:
                    return
                assert self._due is not None
                turn, (first, count) = self._turn, self._due
                first += self._stride * len(self._ready)
            try:
                found: np.ndarray | BaseException = self.source.rows(first, count)
            except BaseException as error:
                found = error
            with self._changed:
                if turn == self._turn and not self._closed:
                    self._ready.append(found)
                    self._changed.notify_all()

    def _has_room(self) -> bool:
        failed = bool(self._ready) and isinstance(self._ready[-1], BaseException)
        return self._due is not None and len(self._ready) < _DEPTH and not failed
