"""The end of a sweep: its table on the terminal, `sweep.csv` and `sweep.png` in its folder, and the command's exit code."""

from __future__ import annotations

import sys

import rich.console

from tptrain.files import write_atomically
from tptrain.sweep import results, table
from tptrain.sweep.plan import Plan


def conclude(plan: Plan, again: int) -> int:
    """Show how all jobs of the sweep stand. again: the exit code of a sweep whose jobs have to go on. Returns the exit code."""
    jobs = results.collect(plan.folder, plan.jobs)
    if not jobs:
        return 1
    terminal = rich.console.Console()
    terminal = terminal if terminal.is_terminal else rich.console.Console(width=200)  # a pipe has no width of its own
    terminal.print(table.table(jobs))
    code = results.exit_code(jobs, again)
    try:
        _write(plan, jobs)
    except OSError as error:
        sys.stderr.write(f"tptrain: hydra.sweep.dir={plan.folder} has no sweep.csv and sweep.png, as it cannot be written to ({error})\n")
        return code or 1
    return code


def _write(plan: Plan, jobs: list[results.JobResult]) -> None:
    from tptrain.sweep.draw import picture

    write_atomically(plan.folder / "sweep.csv", table.csv_text(jobs).encode())
    print(plan.folder / "sweep.csv")
    drawn = picture(jobs)
    if drawn is not None:
        write_atomically(plan.folder / "sweep.png", drawn)
        print(plan.folder / "sweep.png")
