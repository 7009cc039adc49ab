"""What of a report is slow or short.

Slow is judged beside others of the same kind: a rank's matrix products beside the median of all other ranks', a link's bandwidth beside
the median of all other links that should be equally fast. So two ranks are enough to tell the slower one, and many slow ones do not hide
behind one another until they are half of all. On the CPU the time for which a rank had its cores tells by itself, also of a single rank,
whether something else uses them. Short is what cannot hold what the run needs at the least.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.config import DoctorConfig
from tptrain.doctor.needs import Needs
from tptrain.doctor.record import Link, RankRecord, Report, ranks_text
from tptrain.doctor.units import amount, percent, seconds

CLOCK_SECONDS = 1.0
"""A clock that is further off than this is worth a finding: log lines of two ranks then come in the wrong order."""
STORE_DISK_BYTES = 10**9
"""Less free disk for token stores than this is short; how much one takes is known only once the text is read."""


@dataclass(frozen=True)
class Finding:
    """Something that is slow or short."""

    kind: str
    """slow rank, busy cores, slow link, memory, disk, clock or run folder."""
    text: str


@dataclass(frozen=True)
class Shortfall:
    """How far a number is below the median of the others of its kind."""

    share: float
    """Of that median; negative where it is above."""
    median: float
    what: str = ""
    """Which of a rank's numbers it is."""


@dataclass(frozen=True)
class Diagnosis:
    """A report, judged."""

    ranks: list[Shortfall | None]
    """By rank: its worst number beside the others'; None where it is alone."""
    links: list[Shortfall | None]
    """By link; None where there is no other of its kind."""
    findings: list[Finding]

    @property
    def slowest_rank(self) -> int | None:
        """The one furthest below the others."""
        return _worst(self.ranks)

    @property
    def slowest_link(self) -> int | None:
        """The number in the report of the one furthest below the others of its kind; None where no link has any."""
        return _worst(self.links)


def diagnose(report: Report, limits: DoctorConfig, needs: Needs) -> Diagnosis:
    """Judge a report."""
    ranks, links = rank_shortfalls(report.ranks), link_shortfalls(report.links)
    return Diagnosis(ranks, links, [*slow(report, limits), *_short(report.ranks, needs)])


def slow(report: Report, limits: DoctorConfig) -> list[Finding]:
    """What is slow."""
    found = [
        Finding("slow rank", describe_rank(rank, short))
        for rank, short in zip(report.ranks, rank_shortfalls(report.ranks), strict=True)
        if short is not None and short.share > limits.slow_rank
    ]
    found += _busy(report.ranks, limits.slow_rank)
    found += [
        Finding("slow link", describe_link(link, short))
        for link, short in zip(report.links, link_shortfalls(report.links), strict=True)
        if short is not None and short.share > limits.slow_link
    ]
    return found


def shortfalls(values: Sequence[float]) -> list[Shortfall | None]:
    """Of each value beside the median of the others.

    >>> [round(short.share, 2) for short in shortfalls([10.0, 10.0, 10.0, 4.0])]
    [0.0, 0.0, 0.0, 0.6]
    """
    found: list[Shortfall | None] = []
    for place, value in enumerate(values):
        others = [*values[:place], *values[place + 1 :]]
        median = statistics.median(others) if others else 0.0
        found.append(Shortfall(1 - value / median, median) if others else None)
    return found


def rank_shortfalls(ranks: Sequence[RankRecord]) -> list[Shortfall | None]:
    """Of each rank that of its matrix products which is worst."""
    worst: list[Shortfall | None] = [None] * len(ranks)
    for what in ranks[0].matmul_flops_per_second:
        for place, short in enumerate(shortfalls([rank.matmul_flops_per_second[what] for rank in ranks])):
            before = worst[place]
            if short is not None and (before is None or short.share > before.share):
                worst[place] = Shortfall(short.share, short.median, what)
    return worst


def link_shortfalls(links: Sequence[Link]) -> list[Shortfall | None]:
    """Of each link's bandwidth beside that of the others that are like it."""
    found: list[Shortfall | None] = [None] * len(links)
    for like in {link.like for link in links}:
        places = [place for place, link in enumerate(links) if link.like == like]
        for place, short in zip(places, shortfalls([links[place].bandwidth_bytes_per_second for place in places]), strict=True):
            found[place] = short
    return found


def better(one: Report, other: Report) -> Report:
    """Of two reports on the same ranks, each number from where it is better: what was in the way only once is no fault of the machine."""
    for rank, again in zip(one.ranks, other.ranks, strict=True):
        rates = rank.matmul_flops_per_second
        rank.matmul_flops_per_second = {what: max(rate, again.matmul_flops_per_second[what]) for what, rate in rates.items()}
        if rank.core_share is not None and again.core_share is not None:
            rank.core_share = max(rank.core_share, again.core_share)
    for link, seen in zip(one.links, other.links, strict=True):
        link.latency_seconds = min(link.latency_seconds, seen.latency_seconds)
        link.bandwidth_bytes_per_second = max(link.bandwidth_bytes_per_second, seen.bandwidth_bytes_per_second)
    return one


# ---- in words --------------------------------------------------------------------------------------------


def describe_rank(rank: RankRecord, short: Shortfall) -> str:
    """`rank 1 on host-a: 34.0 GFLOP/s in fp32, 52 % below the median of the others, 70.8 GFLOP/s`."""
    rate = amount(rank.matmul_flops_per_second[short.what], "FLOP/s")
    return f"rank {rank.rank} on {rank.host}: {rate} in {short.what}, {_beside(short, 'FLOP/s')}"


def describe_link(link: Link, short: Shortfall | None) -> str:
    """`tp all-reduce of ranks 0, 1: 1.21 GB/s, 3 % below the median of the others like it, 1.25 GB/s`."""
    beside = _beside(short, "B/s", " like it") if short is not None else "no other to compare it with"
    return f"{link.name}: {amount(link.bandwidth_bytes_per_second, 'B/s')}, {beside}"


def _beside(short: Shortfall, unit: str, like: str = "") -> str:
    side = "below" if short.share >= 0 else "above"
    return f"{percent(abs(short.share))} {side} the median of the others{like}, {amount(short.median, unit)}"


def _worst(shortfalls: Sequence[Shortfall | None]) -> int | None:
    known = [(short.share, -place) for place, short in enumerate(shortfalls) if short is not None]
    return -max(known)[1] if known else None


# ---- cores -----------------------------------------------------------------------------------------------


def _busy(ranks: Sequence[RankRecord], limit: float) -> list[Finding]:
    """A finding a host whose ranks had their cores for less of the time than their even share of these, by more than `limit` of it."""
    found = []
    for host in dict.fromkeys(rank.host for rank in ranks):
        here = [rank for rank in ranks if rank.host == host]
        threads = sum(rank.threads for rank in here)
        known = {rank.rank: rank.core_share for rank in here if rank.core_share is not None}
        even = {rank.rank: min(1.0, rank.cores / threads) for rank in here}
        short = {rank: share for rank, share in known.items() if share < (1 - limit) * even[rank]}
        if short:
            shares = " to ".join(dict.fromkeys((percent(min(short.values())), percent(max(short.values())))))
            text = f"{ranks_text(short)} on {host} had the cores for {shares} of the time: something else runs there"
            found.append(Finding("busy cores", text))
    return found


# ---- short -----------------------------------------------------------------------------------------------


def _short(ranks: Sequence[RankRecord], needs: Needs) -> list[Finding]:
    """What cannot hold the run, clocks that are off, and ranks that see another run folder."""
    found = _short_memory(ranks, needs)
    wanted = needs.checkpoints * needs.checkpoint - needs.existing
    least = min(ranks, key=lambda rank: rank.run_disk_free_bytes)
    if least.run_disk_free_bytes < wanted:
        have = f"{amount(least.run_disk_free_bytes, 'B')} free for the run folder on {least.host}"
        sizes = f"{needs.checkpoints} checkpoints of {amount(needs.checkpoint, 'B')} (checkpoint.keep and one being written)"
        found.append(Finding("disk", f"{have}, and {sizes} want {amount(wanted, 'B')} more"))
    least = min(ranks, key=lambda rank: rank.store_disk_free_bytes)
    if least.store_disk_free_bytes < STORE_DISK_BYTES:
        have = f"{amount(least.store_disk_free_bytes, 'B')} free for data.store_dir on {least.host}"
        found.append(Finding("disk", f"{have}, less than {amount(STORE_DISK_BYTES, 'B')}"))
    for rank in ranks:
        if abs(rank.clock_offset_seconds) - rank.clock_error_seconds > CLOCK_SECONDS:
            text = f"the clock of rank {rank.rank} on {rank.host} is {seconds(rank.clock_offset_seconds)} off rank 0's"
            found.append(Finding("clock", f"{text} (within {seconds(rank.clock_error_seconds)}): let both hosts use NTP"))
    blind = [rank.rank for rank in ranks if not rank.sees_run_folder]
    if blind:
        text = f"{ranks_text(blind)} do{'es' * (len(blind) == 1)} not see rank 0's run folder, where every rank writes its checkpoints"
        found.append(Finding("run folder", f"{text}: use a hydra.run.dir that all hosts share"))
    return found


def _short_memory(ranks: Sequence[RankRecord], needs: Needs) -> list[Finding]:
    """Each GPU for its rank; on the CPU each host for all of its ranks."""
    found = []
    together = [[rank] for rank in ranks]
    if ranks[0].device.startswith("cpu"):
        together = [[rank for rank in ranks if rank.host == host] for host in dict.fromkeys(rank.host for rank in ranks)]
    for sharing in together:
        known = [rank.memory_free_bytes for rank in sharing if rank.memory_free_bytes is not None]
        wanted = sum(needs.states[rank.rank] for rank in sharing)
        if known and min(known) < wanted:
            who = ranks_text(rank.rank for rank in sharing)
            states = f"the weights, gradients and moments of {who} alone take {amount(wanted, 'B')}"
            found.append(Finding("memory", f"{amount(min(known), 'B')} free on {sharing[0].host}, and {states}"))
    return found
