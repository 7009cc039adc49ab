"""A dry run as tables: what each rank called and kept, beside what the plan says."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tptrain.config import Config
from tptrain.dry_run.trace import TracedRank

_GIB = 2**30


def show_trace(config: Config, ranks: Sequence[TracedRank], terminal: Console) -> None:
    """Print a table of calls and bytes, one of the peak of memory, and what ran. config: resolved, with all its micro-batches."""
    terminal.print(call_table(ranks))
    terminal.print(memory_table(ranks))
    steps = {rank.micro_batches for rank in ranks}
    for micro_batches in steps:
        of = (
            f"{micro_batches} of {config.parallel.micro_batches} micro-batches"
            if micro_batches < config.parallel.micro_batches
            else "whole"
        )
        seconds = sum(rank.seconds for rank in ranks)
        terminal.print(f"dry run     one step, {of}, on {len(ranks)} of {config.processes} ranks: {seconds:.0f} s of work", soft_wrap=True)
    different = [str(rank.pp_rank) for rank in ranks if not rank.same_calls]
    verdict = f"differ on pipeline rank {', '.join(different)}" if different else "are those of the plan, to the byte"
    terminal.print(f"            calls and bytes {verdict}", soft_wrap=True)


def call_table(ranks: Sequence[TracedRank]) -> Table:
    """A row for each group and operation of a rank, or of several that plan and do the same."""
    table = Table()
    for heading in ("pipeline rank", "group", "operation", "planned calls", "traced", "planned bytes", "traced", ""):
        table.add_column(heading, justify="left" if heading in ("group", "operation", "") else "right")
    alike: dict[str, list[TracedRank]] = {}
    for rank in ranks:
        alike.setdefault(repr((rank.planned, rank.traced)), []).append(rank)
    for same in alike.values():
        label, first = " ".join(str(rank.pp_rank) for rank in same), same[0]
        for group, operation in sorted(first.planned.keys() | first.traced.keys()):
            planned, traced = (totals.get((group, operation), (0, 0)) for totals in (first.planned, first.traced))
            numbers = [f"{each:,}" for pair in zip(planned, traced, strict=True) for each in pair]
            table.add_row(label, group, operation, *numbers, "" if planned == traced else "differs")
            label = ""
        table.add_section()
    return table


def memory_table(ranks: Sequence[TracedRank]) -> Table:
    """A row a rank."""
    table = Table()
    for heading in ("pipeline rank", "rank", "planned peak", "traced peak", "planned / traced"):
        table.add_column(heading, justify="right")
    for rank in ranks:
        planned, traced = rank.planned_peak_bytes, rank.traced_peak_bytes
        table.add_row(f"{rank.pp_rank}", f"{rank.rank}", f"{planned / _GIB:.3f} GiB", f"{traced / _GIB:.3f} GiB", f"{planned / traced:.3f}")
    return table
