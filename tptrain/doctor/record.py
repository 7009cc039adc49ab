"""What is found out about one rank and about one link between ranks, and the ranks' common report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RankRecord:
    """One rank. A number that is not known is None."""

    rank: int
    host: str
    device: str
    cores: int
    """CPU cores that the process may use."""
    threads: int
    """CPU threads that it computes with."""
    memory_free_bytes: int | None
    """Of the device; on CPU of the machine, or of the control group that the process is in."""
    memory_total_bytes: int | None
    run_disk_free_bytes: int
    """Where the run folder is."""
    store_disk_free_bytes: int
    """Where `data.store_dir` is."""
    sees_run_folder: bool = True
    """Whether it sees a file that rank 0 wrote there."""
    clock_offset_seconds: float = 0.0
    """Its wall clock minus rank 0's."""
    clock_error_seconds: float = 0.0
    """How far off that may be."""
    matmul_flops_per_second: dict[str, float] = field(default_factory=dict)
    """By fp32 and bf16, with all ranks at work."""
    core_share: float | None = None
    """On CPU: the share of that time in which its threads ran, of so many cores; less than 1 where something else uses them."""


@dataclass
class Link:
    """Ranks that communicate, and one way in which training has them do it."""

    kind: str
    """tp, pp, dp or all."""
    operation: str
    ranks: list[int]
    across: bool
    """Whether they are on several machines."""
    latency_seconds: float
    """Of a message of one number a rank."""
    bandwidth_bytes_per_second: float
    """What a rank sends, at a large message: of n ranks 2 (n - 1) / n of an all-reduced message, (n - 1) / n of one that is gathered or
    reduce-scattered, all of one that is sent."""

    @property
    def name(self) -> str:
        """`tp all-reduce of ranks 0-3`."""
        return f"{self.kind} {self.operation} {'between' if self.kind == 'pp' else 'of'} {ranks_text(self.ranks)}"

    @property
    def like(self) -> tuple[str, str, int, bool]:
        """Links that have this in common should be equally fast."""
        return (self.kind, self.operation, len(self.ranks), self.across)


@dataclass
class Report:
    """What the ranks found together."""

    versions: dict[str, str | None]
    """The same on all of them."""
    ranks: list[RankRecord]
    links: list[Link]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Report:
        """Back from JSON."""
        ranks = [RankRecord(**one) for one in content["ranks"]]
        return Report(content["versions"], ranks, [Link(**one) for one in content["links"]])


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`.

    >>> ranks_text([3]), ranks_text([5, 0, 1, 2]), ranks_text([0, 1])
    ('rank 3', 'ranks 0-2, 5', 'ranks 0, 1')
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' * (sum(map(len, runs)) > 1)} {', '.join(texts)}"
