"""A dry run as tables: what each rank called and kept, beside what the plan says."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tptrain.config import Config
from tptrain.dry_run.trace import TracedRank
from tptrain.plan.units import as_bytes


def facts(config: Config, ranks: Sequence[TracedRank]) -> list[tuple[str, str]]:
    """What ran and whether it was as planned, as (label, value). config: resolved, with all its micro-batches."""
    ran, asked, seconds = ranks[0].micro_batches, config.parallel.micro_batches, sum(rank.seconds for rank in ranks)
    what = "the whole step" if ran == asked else f"a step of {ran} of its {asked} micro-batches, which fill the pipeline,"
    different = [str(rank.pp_rank) for rank in ranks if not rank.same_calls]
    verdict = f"differ on pipeline rank {', '.join(different)}" if different else "are those of the plan, to the byte"
    worst = max(ranks, key=lambda rank: abs(rank.planned_peak_bytes - rank.traced_peak_bytes) / rank.traced_peak_bytes)
    error = worst.planned_peak_bytes / worst.traced_peak_bytes - 1
    return [
        ("dry run", f"{what} on {len(ranks)} of {config.processes} ranks, {seconds:.0f} s of work; calls and bytes {verdict}"),
        ("", f"the planned peak of memory is at most {100 * error:+.1f} % off, on pipeline rank {worst.pp_rank}"),
    ]


def call_table(ranks: Sequence[TracedRank]) -> Table:
    """A row for each group and operation of a rank, or of several that plan and do the same."""
    table = Table(title="dry run: calls of the process groups")
    for heading in ("pp rank", "group", "operation", "planned calls", "traced", "planned bytes", "traced", ""):
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
    table = Table(title="dry run: tensors at their most")
    for heading in ("pp rank", "rank", "planned peak", "traced peak", "planned / traced"):
        table.add_column(heading, justify="right")
    for rank in ranks:
        planned, traced = rank.planned_peak_bytes, rank.traced_peak_bytes
        table.add_row(f"{rank.pp_rank}", f"{rank.rank}", as_bytes(planned), as_bytes(traced), f"{planned / traced:.3f}")
    return table
