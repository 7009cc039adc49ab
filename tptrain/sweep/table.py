"""A sweep's jobs as a table for the terminal, and as `sweep.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from tptrain.monitor.text import compact, fixed, harmless
from tptrain.sweep.results import JobResult, swept_keys

_COLOURS = {"done": "green", "failed": "red", "refused": "red", "stopped": "yellow", "waiting": "dim", "running": "cyan"}
_SHORT = 100
"""Characters of an error that the terminal shows; `sweep.csv` has it whole."""


def table(results: Sequence[JobResult]) -> Table:
    """A row a job: the keys that differ, how it ended, its final numbers, and why it has none."""
    keys = swept_keys(results)
    shown = Table(title=summary(results), title_justify="left", header_style="bold")
    shown.add_column("job", justify="right")
    for key in keys:
        shown.add_column(Text(harmless(key)), overflow="fold")
    shown.add_column("status")
    for name in ("step", "loss", "val loss", "tokens/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    if any(job.error for job in results):
        shown.add_column("cause", overflow="fold", min_width=12)
    for job in results:
        cells = [str(job.number), *(harmless(job.overrides.get(key, "")) for key in keys)]
        step = "-" if job.step is None else str(job.step)
        numbers = [step, fixed(job.loss, 6).strip(), fixed(job.val_loss, 6).strip(), compact(job.tokens_per_second)]
        cause = [short(harmless(job.error))] if any(each.error for each in results) else []
        state = Text(job.status, style=_COLOURS.get(job.status, ""))
        shown.add_row(*map(Text, cells), state, *map(Text, numbers), *map(Text, cause))
    return shown


def summary(results: Sequence[JobResult]) -> str:
    """How many jobs there are of each kind.

    >>> summary([JobResult(0, {}, "done"), JobResult(1, {}, "failed"), JobResult(2, {}, "done")])
    '3 jobs: 2 done, 1 failed'
    """
    counts = {state: sum(job.status == state for job in results) for state in dict.fromkeys(job.status for job in results)}
    return f"{len(results)} job{'s' * (len(results) != 1)}: {', '.join(f'{count} {state}' for state, count in counts.items())}"


def csv_text(results: Sequence[JobResult]) -> str:
    """The same as comma-separated values, with whole numbers and errors; what is not known is empty."""
    keys, text = swept_keys(results), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *keys, "status", "step", "loss", "val_loss", "tokens_per_second", "error", "folder"])
    for job in results:
        values = [job.status, job.step, job.loss, job.val_loss, job.tokens_per_second, job.error, job.folder]
        cells = [job.number, *(job.overrides.get(key, "") for key in keys), *values]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def short(text: str) -> str:
    """The first characters of a long text."""
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
