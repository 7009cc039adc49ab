"""How far an evaluation has come: a bar on a terminal."""

from __future__ import annotations

from types import TracebackType


class EvalProgress:
    """A bar on standard error, if that is a terminal. As a context manager, removes it at the end."""

    def __init__(self, label: str, total: int, visible: bool = True) -> None:
        """total: rows. visible: whether this rank is the one that shows it."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("evaluating {task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not (visible and console.is_terminal))
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> EvalProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def reach(self, rows: int) -> None:
        """So many rows are done."""
        self._bar.update(self._task, completed=rows)
