"""Pipeline schedules as data: pure functions from (ranks, stages a rank, micro-batches) to a list of actions for each rank.

    gpipe, p=3, m=4      rank 0  F0 F1 F2 F3             B0 B1 B2 B3
    (Huang et al. 2019)  rank 1     F0 F1 F2 F3       B0 B1 B2 B3
                         rank 2        F0 F1 F2 F3 B0 B1 B2 B3

    1f1b, p=3, m=4       rank 0  F0 F1 F2       B0 F3 B1    B2    B3
    (Narayanan et al.    rank 1     F0 F1    B0 F2 B1 F3 B2    B3
    2021)                rank 2        F0 B0 F1 B1 F2 B2 F3 B3

    interleaved, p=2, v=2, m=4; stages 0 and 2 on rank 0, 1 and 3 on rank 1; written stage, kind, micro-batch
    (Narayanan et al.    rank 0  0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1     2B2     2B3 0B2 0B3
    2021)                rank 1      1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3

The zero-bubble schedules are in `zero_bubble.py`. A schedule names only the computation; `actions.with_transfers` adds the
sends and receives that follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from tptrain.pipeline.actions import Action, Kind, Schedule
from tptrain.pipeline.zero_bubble import zb_h1, zb_v


def gpipe(ranks: int, stages_per_rank: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards. Keeps the activations of every micro-batch."""
    schedule = []
    for rank in range(ranks):
        stages = range(rank, ranks * stages_per_rank, ranks)
        forwards = [Action(Kind.FORWARD, stage, m) for stage in stages for m in range(micro_batches)]
        backwards = [Action(Kind.BACKWARD, stage, m) for stage in reversed(stages) for m in range(micro_batches)]
        schedule.append(forwards + backwards)
    return schedule


def one_forward_one_backward(ranks: int, stages_per_rank: int, micro_batches: int) -> Schedule:
    """1F1B: stage s runs ahead by p - s forwards, then alternates. Keeps at most p - s micro-batches' activations."""
    assert stages_per_rank == 1
    schedule = []
    for stage in range(ranks):
        forwards = [Action(Kind.FORWARD, stage, m) for m in range(micro_batches)]
        backwards = [Action(Kind.BACKWARD, stage, m) for m in range(micro_batches)]
        schedule.append(_alternate(forwards, backwards, ranks - 1 - stage))
    return schedule


def interleaved(ranks: int, stages_per_rank: int, micro_batches: int) -> Schedule:
    """1F1B over stages dealt out in turn: stage s on rank s % p (Narayanan et al. 2021, section 2.2).

    Micro-batches go in groups of p or somewhat more, or all in one if there are fewer; a rank runs a group through each of its stages
    in turn. Any number will do: groups differ by one at most, the larger ones first (the smaller ones first would need a backward
    before its forward). Rank r is ahead by v - 1 times the first group and 2 * (p - 1 - r) forwards, then alternates, and keeps one
    stage's activations of one micro-batch more than it is ahead.
    """
    groups = max(1, micro_batches // ranks)
    short, longer = divmod(micro_batches, groups)
    bounds = [group * short + min(group, longer) for group in range(groups + 1)]
    schedule = []
    for rank in range(ranks):
        stages = range(rank, ranks * stages_per_rank, ranks)
        parts = [range(first, last) for first, last in pairwise(bounds)]
        forwards = [Action(Kind.FORWARD, stage, m) for part in parts for stage in stages for m in part]
        backwards = [Action(Kind.BACKWARD, stage, m) for part in parts for stage in reversed(stages) for m in part]
        schedule.append(_alternate(forwards, backwards, (stages_per_rank - 1) * bounds[1] + 2 * (ranks - 1 - rank)))
    return schedule


def _alternate(forwards: list[Action], backwards: list[Action], ahead: int) -> list[Action]:
    """`ahead` forwards, or all; then one forward and one backward in turn; then the backwards that are left."""
    steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return forwards[:ahead] + steady + backwards[max(len(forwards) - ahead, 0) :]


def forward_only(ranks: Sequence[int], micro_batches: int) -> Schedule:
    """For evaluation and generation: every forward, no backward. ranks: of each stage.

    A rank of v stages spends v units on a micro-batch, so stage s does micro-batch m at about v * m + s; in this order no more than a
    few activations wait between two stages, however many micro-batches there are.
    """
    holders = max(ranks) + 1
    each = len(ranks) // holders
    return [
        sorted(
            (Action(Kind.FORWARD, stage, m) for stage in range(len(ranks)) if ranks[stage] == rank for m in range(micro_batches)),
            key=lambda action: (each * action.micro_batch + action.stage, action.stage),
        )
        for rank in range(holders)
    ]


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb_h1": zb_h1,
    "zb_v": zb_v,
}
"""What `parallel.schedule` may name. Each takes the pipeline ranks p, the stages a rank v and the micro-batches m."""
