"""When computations begin and end, as the device that computes sees it.

On a GPU a stamp is an event in the stream, so that nothing waits for the device while the step runs; the times are read afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tptrain.pipeline.actions import Action
from tptrain.pipeline.timeline import Span


class Clock:
    """Records the computations of one step on this rank."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what was recorded: a new step begins."""
        self._zero_seconds, self._zero = time.perf_counter(), self._stamp()
        self._stamps: list[tuple[Action, Any, Any]] = []

    @contextmanager
    def computing(self, action: Action) -> Iterator[None]:
        """Record the block as the computation of `action`."""
        start = self._stamp()
        yield
        self._stamps.append((action, start, self._stamp()))

    def spans(self) -> list[Span]:
        """What was recorded, in seconds of `time.perf_counter`. On a GPU: waits for the last of it."""
        if self._stamps and self.on_gpu:
            self._stamps[-1][2].synchronize()
        return [Span(action, self._seconds(start), self._seconds(end)) for action, start, end in self._stamps]

    def _stamp(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, stamp: Any) -> float:
        return self._zero_seconds + self._zero.elapsed_time(stamp) / 1000 if self.on_gpu else stamp
