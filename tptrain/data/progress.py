"""How far a build has come: a bar on a terminal, and what is still needed where a disk is full."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType


class BuildProgress:
    """A bar on standard error, if that is a terminal. As a context manager, removes it at the end."""

    def __init__(self, label: str, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("tokenising {task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(label, total=total_bytes)
        self._stack = ExitStack()
        self.total_bytes = total_bytes
        self.text_bytes = 0
        """Text that was tokenised."""
        self.stored_bytes = 0
        """What was written of it."""
        self._started = time.perf_counter()

    def __enter__(self) -> BuildProgress:
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def add(self, text_bytes: int, stored_bytes: int) -> None:
        """Some more was done."""
        self.text_bytes += text_bytes
        self.stored_bytes += stored_bytes
        self._bar.advance(self._task, text_bytes)

    @property
    def seconds_left(self) -> float:
        """How long the rest takes at the speed so far, in this process."""
        spent = time.perf_counter() - self._started
        return spent * (self.total_bytes - self.text_bytes) / max(self.text_bytes, 1)

    @property
    def needed_bytes(self) -> int | None:
        """About how much all of the store takes; None before it is known."""
        return self.stored_bytes * self.total_bytes // self.text_bytes if self.text_bytes else None
