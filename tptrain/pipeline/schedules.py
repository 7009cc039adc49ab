"""Pipeline schedules as data: pure functions from (stages, micro-batches) to a list of actions for each rank.

    gpipe, p=3, m=4      rank 0  F0 F1 F2 F3             B0 B1 B2 B3
    (Huang et al. 2019)  rank 1     F0 F1 F2 F3       B0 B1 B2 B3
                         rank 2        F0 F1 F2 F3 B0 B1 B2 B3

    1f1b, p=3, m=4       rank 0  F0 F1 F2       B0 F3 B1    B2    B3
    (Narayanan et al.    rank 1     F0 F1    B0 F2 B1 F3 B2    B3
    2021)                rank 2        F0 B0 F1 B1 F2 B2 F3 B3

A schedule names only the computation; `actions.with_transfers` adds the sends and receives that follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tptrain.pipeline.actions import Action, Kind, Schedule


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
        ahead = min(ranks - stage - 1, micro_batches)
        forwards = [Action(Kind.FORWARD, stage, m) for m in range(micro_batches)]
        backwards = [Action(Kind.BACKWARD, stage, m) for m in range(micro_batches)]
        steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
        schedule.append(forwards[:ahead] + steady + backwards[micro_batches - ahead :])
    return schedule


def forward_only(ranks: Sequence[int], micro_batches: int) -> Schedule:
    """For evaluation and generation: every forward, no backward. ranks: of each stage."""
    return [
        [Action(Kind.FORWARD, stage, m) for stage in range(len(ranks)) if ranks[stage] == rank for m in range(micro_batches)]
        for rank in range(max(ranks) + 1)
    ]


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
"""What `parallel.schedule` may name."""
