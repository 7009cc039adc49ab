"""The language of schedules: actions, which rank holds which stage, and the transfers that follow from the computations.

A schedule lists, for each pipeline rank, what it does, in order. The functions of `schedules.py` and files that users write name
computations alone; `with_transfers` adds the sends and receives. Stages are numbered over the whole pipeline; a rank may hold
several, and may hold two neighbours, between which nothing is sent.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
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

    __hash__ = object.__hash__  # each is one object; Enum's own hashes the name, in Python, and schedules hash millions


COMPUTATIONS = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
SENDS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)


class Action(NamedTuple):
    """One unit of a schedule. A receive only starts; the computation that needs its tensor waits for it."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


Schedule = list[list[Action]]
"""For each pipeline rank, what it does, in order."""


class ScheduleError(ValueError):
    """The schedule is wrong; the message says on which rank, at which position, and why."""


def placement(schedule: Schedule) -> list[int]:
    """The rank of each stage, read from where its forwards stand. Raises ScheduleError for a stage on no rank or on two.

    >>> placement([[Action(Kind.FORWARD, 0, 0), Action(Kind.FORWARD, 3, 0)], [Action(Kind.FORWARD, 1, 0), Action(Kind.FORWARD, 2, 0)]])
    [0, 1, 1, 0]
    """
    ranks: dict[int, int] = {}
    for rank, actions in enumerate(schedule):
        for position, action in enumerate(actions):
            if action.kind is Kind.FORWARD and ranks.setdefault(action.stage, rank) != rank:
                raise ScheduleError(f"rank {rank}, position {position}: {action} is of a stage that rank {ranks[action.stage]} holds")
    missing = next((stage for stage in range(max(ranks, default=0) + 1) if stage not in ranks), None)
    if missing is not None:
        raise ScheduleError(f"stage {missing} has no forward on any rank")
    return [ranks[stage] for stage in range(len(ranks))]


def with_transfers(schedule: Schedule) -> Schedule:
    """Add sends right after the computations that make what is sent, and receives ahead of those that need it.

    A receive starts one computation before the one that needs it, or earlier: as soon as its tensor would be sent if every
    computation took its usual time. So a send waits for no more than the computation that its receiver is at, and a schedule that
    can run at all also runs where few sends may be under way. All that one rank sends another travels in one order, so receives
    start in the order of the sends.

    >>> [str(action) for action in with_transfers([[Action(Kind.FORWARD, 0, 0), Action(Kind.FORWARD, 0, 1)],
    ...                                            [Action(Kind.FORWARD, 1, 0), Action(Kind.FORWARD, 1, 1)]])[1]]
    ['1RF0', '1RF1', '1F0', '1F1']
    """
    ranks = placement(schedule)
    times = usual_times(schedule, ranks)
    sent = {  # by receive: its send's place in the sender's list, and when its tensor is made, if ever
        receive_of(send): (place, times[rank][place][1] if place < len(times[rank]) else sys.maxsize)
        for rank, computations in enumerate(schedule)
        for place, action in enumerate(computations)
        for send in sends_after(action, ranks)
    }
    result = []
    for rank, computations in enumerate(schedule):
        starts = [start for start, _ in times[rank]]
        channels: dict[int, list[tuple[int, int, Action]]] = defaultdict(list)  # by sender: order, the latest place to start, receive
        for place, action in enumerate(computations):
            receive = receive_before(action, ranks)
            if receive is not None:
                order, made = sent.get(receive, (sys.maxsize, sys.maxsize))
                latest = min(max(place - 1, 0), bisect_left(starts, made))
                channels[ranks[peer_stage(receive)]].append((order, latest, receive))
        starting: dict[int, list[Action]] = defaultdict(list)  # by place in this rank's list, the last one first
        for channel in channels.values():
            place = len(computations)
            for _, latest, receive in sorted(channel, key=lambda entry: entry[:2], reverse=True):
                place = min(place, latest)
                starting[place].append(receive)
        actions: list[Action] = []
        for place, action in enumerate(computations):
            actions += [*reversed(starting[place]), action, *sends_after(action, ranks)]
        result.append(actions)
    return result


def receive_before(action: Action, ranks: Sequence[int]) -> Action | None:
    """The receive that a computation needs, if any. ranks: of each stage."""
    kind, stage, _ = action
    if kind is Kind.FORWARD and stage > 0 and ranks[stage - 1] != ranks[stage]:
        return action._replace(kind=Kind.RECEIVE_ACTIVATION)
    if kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and stage < len(ranks) - 1 and ranks[stage + 1] != ranks[stage]:
        return action._replace(kind=Kind.RECEIVE_GRADIENT)
    return None


def sends_after(action: Action, ranks: Sequence[int]) -> list[Action]:
    """The send of what a computation made, if any, as a list. ranks: of each stage."""
    kind, stage, _ = action
    if kind is Kind.FORWARD and stage < len(ranks) - 1 and ranks[stage + 1] != ranks[stage]:
        return [action._replace(kind=Kind.SEND_ACTIVATION)]
    if kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and stage > 0 and ranks[stage - 1] != ranks[stage]:
        return [action._replace(kind=Kind.SEND_GRADIENT)]
    return []


def receive_of(send: Action) -> Action:
    """The receive at the other end of a send."""
    if send.kind is Kind.SEND_ACTIVATION:
        return Action(Kind.RECEIVE_ACTIVATION, send.stage + 1, send.micro_batch)
    return Action(Kind.RECEIVE_GRADIENT, send.stage - 1, send.micro_batch)


def peer_stage(transfer: Action) -> int:
    """The stage at the other end of a send or a receive."""
    return transfer.stage + (1 if transfer.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT) else -1)


def source_of(action: Action, stages: int) -> Action | None:
    """The computation on another stage that makes a computation's input, if any; of a gradient, the input gradient, which a
    backward contains."""
    if action.kind is Kind.FORWARD and action.stage > 0:
        return action._replace(stage=action.stage - 1)
    if action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and action.stage < stages - 1:
        return Action(Kind.INPUT_GRADIENT, action.stage + 1, action.micro_batch)
    return None


def usual_times(schedule: Schedule, ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """When each rank's computations start and end if a backward takes 2, any other 1, and transfers no time. ranks: of each stage.

    A rank's list ends before the first computation that can never start.
    """
    times: list[list[tuple[int, int]]] = [[] for _ in schedule]
    made: dict[Action, int] = {}

    def advance(rank: int) -> bool:
        before = len(times[rank])
        for action in schedule[rank][before:]:
            source = source_of(action, len(ranks))
            if source is not None and source not in made:
                break
            start = max(times[rank][-1][1] if times[rank] else 0, made[source] if source else 0)
            whole = action.kind is Kind.BACKWARD
            end = start + (2 if whole else 1)
            times[rank].append((start, end))
            made[action._replace(kind=Kind.INPUT_GRADIENT) if whole else action] = end
        return len(times[rank]) > before

    while any(advance(rank) for rank in range(len(schedule))):
        pass
    return times
