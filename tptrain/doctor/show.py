"""What `tptrain doctor` prints, and what it leaves in `doctor.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from tptrain.config import Config
from tptrain.doctor.judge import Diagnosis, Shortfall, describe_link, describe_rank
from tptrain.doctor.record import Report
from tptrain.doctor.units import amount, percent, seconds

_MOST_ROWS = 32
"""Of a table; the worst are shown."""


def content(config: Config, report: Report, diagnosis: Diagnosis) -> dict[str, Any]:
    """For `doctor.json`."""
    parallel = config.parallel
    links = [{**asdict(link), "below_others": _share(short)} for link, short in zip(report.links, diagnosis.links, strict=True)]
    ranks = [{**asdict(rank), "below_others": _share(short)} for rank, short in zip(report.ranks, diagnosis.ranks, strict=True)]
    return {
        "layout": {"tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp},
        "limits": asdict(config.doctor),
        "versions": report.versions,
        "ranks": ranks,
        "links": links,
        "slowest_rank": diagnosis.slowest_rank,
        "slowest_link": None if diagnosis.slowest_link is None else report.links[diagnosis.slowest_link].name,
        "findings": [asdict(finding) for finding in diagnosis.findings],
    }


def machine_table(report: Report, diagnosis: Diagnosis) -> Table:
    """A row a rank, where it runs and what is free there; of many, the slowest ranks."""
    table = _table("rank", "host", "device", "clock", "memory", "run disk", "store disk")
    for place in _worst_first(diagnosis.ranks):
        rank = report.ranks[place]
        clock = f"{seconds(rank.clock_offset_seconds)} ± {seconds(rank.clock_error_seconds)}" if rank.rank else ""
        free = [rank.memory_free_bytes, rank.run_disk_free_bytes, rank.store_disk_free_bytes]
        _row(table, True, [str(rank.rank), rank.host, rank.device, clock, *(amount(count, "B") for count in free)])
    return table


def speed_table(report: Report, diagnosis: Diagnosis, limit: float) -> Table:
    """A row a rank, how fast it multiplies; of many, the slowest. limit: the shortfall from which on a rank is slow."""
    table = _table("rank", "fp32", "bf16", "had its cores", "below others")
    for place in _worst_first(diagnosis.ranks):
        rank, short = report.ranks[place], diagnosis.ranks[place]
        rates = [amount(rank.matmul_flops_per_second[what], "FLOP/s") for what in ("fp32", "bf16")]
        core = percent(rank.core_share) if rank.core_share is not None else ""
        _row(table, short is None or short.share <= limit, [str(rank.rank), *rates, core, _percent(short)])
    return table


def link_table(report: Report, diagnosis: Diagnosis, limit: float) -> Table:
    """A row a link; of many, the worst. limit: the shortfall from which on a link is slow."""
    table = _table("link", "where", "latency", "bandwidth", "below others")
    for place in _worst_first(diagnosis.links):
        link, short = report.links[place], diagnosis.links[place]
        where = "across hosts" if link.across else "in one host"
        cells = [link.name, where, seconds(link.latency_seconds), amount(link.bandwidth_bytes_per_second, "B/s"), _percent(short)]
        _row(table, short is None or short.share <= limit, cells)
    return table


def summary(report: Report, diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """The slowest, what was left out of the tables, and what was found, as (label, value)."""
    rows = []
    slowest, short = diagnosis.slowest_rank, diagnosis.ranks[diagnosis.slowest_rank or 0]
    if slowest is not None and short is not None:
        rows.append(("slowest rank", describe_rank(report.ranks[slowest], short)))
    if report.links:
        place = diagnosis.slowest_link
        if place is None:
            place = min(range(len(report.links)), key=lambda number: report.links[number].bandwidth_bytes_per_second)
        rows.append(("slowest link", describe_link(report.links[place], diagnosis.links[place])))
    rows += [(finding.kind, finding.text) for finding in diagnosis.findings]
    return rows


def versions_text(report: Report) -> str:
    """`python 3.11.2, torch 2.13.0, ..., the same on all ranks`, without what is not there."""
    found = [f"{name} {version}" for name, version in report.versions.items() if version is not None]
    return ", ".join(found) + ", the same on all ranks" * (len(report.ranks) > 1)


def left_out(report: Report) -> str:
    """How many rows the tables do not have; empty where they have all."""
    counts = [(max(0, len(report.ranks) - _MOST_ROWS), "rank"), (max(0, len(report.links) - _MOST_ROWS), "link")]
    texts = [f"{count} more {what}{'s' * (count > 1)}" for count, what in counts if count]
    return f"{' and '.join(texts)} not shown, which are no slower" if texts else ""


def _worst_first(shortfalls: Sequence[Shortfall | None]) -> list[int]:
    """All places in order; where they are too many, the worst in order."""
    places = sorted(range(len(shortfalls)), key=lambda place: -(_share(shortfalls[place]) or 0))
    return sorted(places[:_MOST_ROWS])


def _share(short: Shortfall | None) -> float | None:
    return None if short is None else short.share


def _percent(short: Shortfall | None) -> str:
    return "" if short is None else percent(max(0.0, short.share))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, good: bool, cells: Iterable[str]) -> None:
    table.add_row(*(Text(cell) for cell in cells), style="" if good else "bold red")
