"""Pipeline schedules as data: pure functions from (stages, micro-batches) to a list of actions for each rank.

    gpipe, p=3, m=4      rank 0  F0 F1 F2 F3             B0 B1 B2 B3
    (Huang et al. 2019)  rank 1     F0 F1 F2 F3       B0 B1 B2 B3
                         rank 2        F0 F1 F2 F3 B0 B1 B2 B3

    1f1b, p=3, m=4       rank 0  F0 F1 F2       B0 F3 B1    B2    B3
    (Narayanan et al.    rank 1     F0 F1    B0 F2 B1 F3 B2    B3
    2021)                rank 2        F0 B0 F1 B1 F2 B2 F3 B3

A schedule names only the computation; `with_transfers` adds the sends and receives that follow from it. Stage s lives on
rank s.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What an action does, for one stage s and one micro-batch."""

    FORWARD = "F"
    BACKWARD = "B"  # both of the next two, as one
    INPUT_GRADIENT = "I"  # what the stage before waits for; leaves the weight gradients to do
    WEIGHT_GRADIENT = "W"  # does them
    SEND_ACTIVATION = "SF"  # s -> s + 1
    RECEIVE_ACTIVATION = "RF"  # s <- s - 1
    SEND_GRADIENT = "SB"  # s -> s - 1
    RECEIVE_GRADIENT = "RB"  # s <- s + 1


class Action(NamedTuple):
    """One unit of a schedule. A receive only starts; the computation that needs its tensor waits for it."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


Schedule = list[list[Action]]
"""For each pipeline rank, what it does, in order."""


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards. Keeps the activations of every micro-batch."""
    return [
        [Action(kind, stage, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(micro_batches)]
        for stage in range(stages)
    ]  # fmt: skip


def one_forward_one_backward(stages: int, micro_batches: int) -> Schedule:
    """1F1B: stage s runs ahead by p - s forwards, then alternates. Keeps at most p - s micro-batches' activations."""
    schedule = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, micro_batches)
        forwards = [Action(Kind.FORWARD, stage, m) for m in range(micro_batches)]
        backwards = [Action(Kind.BACKWARD, stage, m) for m in range(micro_batches)]
        steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
        schedule.append(forwards[:ahead] + steady + backwards[micro_batches - ahead :])
    return schedule


def forward_only(stages: int, micro_batches: int) -> Schedule:
    """For evaluation: every forward, no backward."""
    return [[Action(Kind.FORWARD, stage, m) for m in range(micro_batches)] for stage in range(stages)]


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
"""What `parallel.schedule` may name."""


def with_transfers(schedule: Schedule) -> Schedule:
    """Add sends right after, and receives one computation ahead of, the computations that make and need them.

    >>> [str(action) for action in with_transfers(forward_only(2, 2))[1]]
    ['1RF0', '1RF1', '1F0', '1F1']
    """
    last_stage = len(schedule) - 1
    result = []
    for computations in schedule:
        receives = [_receive(action, last_stage) for action in computations]
        actions = [*receives[0]] if receives else []
        for i, action in enumerate(computations):
            actions += receives[i + 1] if i + 1 < len(receives) else []
            actions.append(action)
            actions += _send(action, last_stage)
        result.append(actions)
    return result


def _receive(action: Action, last_stage: int) -> list[Action]:
    """The receive that a computation needs, if any."""
    if action.kind is Kind.FORWARD and action.stage > 0:
        return [action._replace(kind=Kind.RECEIVE_ACTIVATION)]
    if action.kind is Kind.BACKWARD and action.stage < last_stage:
        return [action._replace(kind=Kind.RECEIVE_GRADIENT)]
    return []


def _send(action: Action, last_stage: int) -> list[Action]:
    """The send of what a computation made, if any."""
    if action.kind is Kind.FORWARD and action.stage < last_stage:
        return [action._replace(kind=Kind.SEND_ACTIVATION)]
    if action.kind is Kind.BACKWARD and action.stage > 0:
        return [action._replace(kind=Kind.SEND_GRADIENT)]
    return []
