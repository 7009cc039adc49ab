"""The language of schedules: actions, which rank holds which stage, and the transfers that follow from the computations.

A schedule lists, for each pipeline rank, what it does, in order. The functions of `schedules.py` and files that users write name
computations alone; `with_transfers` adds the sends and receives. Stages are numbered over the whole pipeline; a rank may hold
several, and may hold two neighbours, between which nothing is sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    missing = [stage for stage in range(max(ranks, default=0) + 1) if stage not in ranks]
    if missing:
        raise ScheduleError(f"stage {missing[0]} has no forward on any rank")
    return [ranks[stage] for stage in range(len(ranks))]


def with_transfers(schedule: Schedule) -> Schedule:
    """Add sends right after the computations that make what is sent, and receives ahead of those that need it.

    A receive starts one computation early. All that one rank sends another travels in one order, so receives start in the order of
    the sends, an early one if need be long before its use.

    >>> [str(action) for action in with_transfers([[Action(Kind.FORWARD, 0, 0), Action(Kind.FORWARD, 0, 1)],
    ...                                            [Action(Kind.FORWARD, 1, 0), Action(Kind.FORWARD, 1, 1)]])[1]]
    ['1RF0', '1RF1', '1F0', '1F1']
    """
    ranks = placement(schedule)
    channels: dict[tuple[int, int], list[Action]] = defaultdict(list)  # by (from, to): the receives, in the order of the sends
    for rank, computations in enumerate(schedule):
        for send in (send for action in computations for send in sends_after(action, ranks)):
            receive = receive_of(send)
            channels[rank, ranks[receive.stage]].append(receive)
    result = []
    for rank, computations in enumerate(schedule):
        queues = {source: iter(receives) for (source, target), receives in channels.items() if target == rank}
        started: set[Action] = set()
        needs = [_start_up_to(receive_before(action, ranks), ranks, queues, started) for action in computations]
        actions = needs[0] if needs else []
        for i, action in enumerate(computations):
            actions += needs[i + 1] if i + 1 < len(needs) else []
            actions += [action, *sends_after(action, ranks)]
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


def _start_up_to(needed: Action | None, ranks: Sequence[int], queues: dict[int, Iterator[Action]], started: set[Action]) -> list[Action]:
    """The receives to start so that `needed` is among them: those its sender sends before it, and it. A receive that nobody sends
    stands alone; the validator finds it."""
    if needed is None or needed in started:
        return []
    starting = []
    for receive in queues.get(ranks[peer_stage(needed)], iter(())):
        starting.append(receive)
        if receive == needed:
            break
    started.update(starting)
    return starting if needed in started else [*starting, needed]
