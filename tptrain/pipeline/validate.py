"""Proof that a schedule can run, before it runs.

What can be read off the lists is read first: every computation once and on its own rank, each after what it needs, every send and
every receive with its other half. All that one rank sends another, activations and gradients together, forms one channel, which
delivers in order. Then `_execute` runs the lists against these channels, as the engine does: a rank stops at a computation until
its input has arrived, and at a send while as many of its sends as there are stages are under way; at nothing else. If no rank can
move, the schedule would hang.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from tptrain.pipeline.actions import (
    COMPUTATIONS,
    SENDS,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    peer_stage,
    placement,
    receive_before,
    receive_of,
    source_of,
    usual_times,
)

_Places = dict[Action, tuple[int, int]]
"""The rank and the position of each action."""


def validate(schedule: Schedule, micro_batches: int, backward: bool = True) -> list[int]:
    """Check a schedule with transfers. Returns each rank's peak of live activations, in micro-batches of one stage.

    A stage's activations of a micro-batch live from its forward to its backward, or to its weight gradient.
    Raises ScheduleError unless every stage lies on one rank and runs each micro-batch's forward (and with `backward` its backward,
    or its input gradient and weight gradient) once, in an order that can be, sends and receives pair up in order, and no rank waits
    for ever.
    """
    ranks = placement(schedule)
    places = _check_computations(schedule, ranks, micro_batches, backward)
    for action in places:
        _check_transfer(action, places, ranks)
    _check_channels(_channels(schedule, ranks), places)
    _execute(schedule, ranks)
    return [_peak(actions) if backward else 0 for actions in schedule]


def check_computations(schedule: Schedule, micro_batches: int, backward: bool = True) -> None:
    """Check a schedule without transfers, as users write them. Raises ScheduleError as `validate` does, and for a cycle.

    What passes also passes `validate` once `with_transfers` has added the transfers.
    """
    ranks = placement(schedule)
    _check_computations(schedule, ranks, micro_batches, backward)
    for rank, times in enumerate(usual_times(schedule, ranks)):
        if len(times) < len(schedule[rank]):
            action = schedule[rank][len(times)]
            source = source_of(action, len(ranks))
            assert source is not None, "only what needs another stage has to wait"
            reason = f"rank {ranks[source.stage]}, which makes its input in stage {source.stage}, waits for others in turn"
            raise ScheduleError(f"rank {rank}, position {len(times)}: {action} waits for ever: {reason}")


def _check_computations(schedule: Schedule, ranks: Sequence[int], micro_batches: int, backward: bool) -> _Places:
    """Every computation once, on its own rank, after what it needs there. Returns where each action stands."""
    places = _place_each(schedule, ranks, micro_batches, backward)
    _check_complete(places, ranks, micro_batches, backward)
    for action in places:
        if action.kind in COMPUTATIONS:
            _check_order(action, places, ranks)
    return places


def _place_each(schedule: Schedule, ranks: Sequence[int], micro_batches: int, backward: bool) -> _Places:
    """Every action one that can be, and standing once."""
    places: _Places = {}
    for rank, actions in enumerate(schedule):
        for position, action in enumerate(actions):
            if action in places:
                raise ScheduleError(f"rank {rank}, position {position}: {action} stands twice")
            places[action] = (rank, position)
            reason = _what_is_foreign(action, rank, ranks, micro_batches, backward)
            if reason is not None:
                raise _fault(action, places, reason)
    return places


def _what_is_foreign(action: Action, rank: int, ranks: Sequence[int], micro_batches: int, backward: bool) -> str | None:
    """Why an action has no place on a rank, if so."""
    kind, stage, m = action
    if stage not in range(len(ranks)):
        return "is of a stage that has no forward on any rank"
    if ranks[stage] != rank:
        return f"is of a stage that rank {ranks[stage]} holds"
    if m not in range(micro_batches):
        return f"is of a micro-batch that does not exist: there are {micro_batches}, counted from 0"
    if not backward and kind not in (Kind.FORWARD, Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION):
        return "has no place in a schedule without backward"
    if kind not in COMPUTATIONS:
        peer = peer_stage(action)
        if peer not in range(len(ranks)):
            return f"has no stage {peer} at its other end"
        if ranks[peer] == rank:
            return f"has the same rank at its other end, in stage {peer}"
    return None


def _check_complete(places: _Places, ranks: Sequence[int], micro_batches: int, backward: bool) -> None:
    """Every computation there; a backward whole or in its two parts."""
    for stage, rank in enumerate(ranks):
        for m in range(micro_batches):
            whole, *parts = (Action(kind, stage, m) for kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT))
            needed = [Action(Kind.FORWARD, stage, m)]
            if backward:
                needed += parts if any(part in places for part in parts) else [whole]
            for part in parts:
                if whole in places and part in places:
                    raise _fault(part, places, f"stands beside {whole}, which contains it")
            for action in needed:
                if action not in places:
                    raise ScheduleError(f"rank {rank}: {action} is missing")


def _check_order(action: Action, places: _Places, ranks: Sequence[int]) -> None:
    """A computation after what it needs on its own rank."""
    kind, stage, m = action
    if kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and _before(action, Action(Kind.FORWARD, stage, m), places):
        raise _fault(action, places, "stands before its forward")
    if kind is Kind.WEIGHT_GRADIENT and _before(action, action._replace(kind=Kind.INPUT_GRADIENT), places):
        raise _fault(action, places, "stands before its input gradient")
    source = source_of(action, len(ranks))
    if source is not None and ranks[source.stage] == ranks[stage]:
        source = _standing(source, places)
        if _before(action, source, places):
            raise _fault(action, places, f"stands before {source}, which makes its input")


def _check_transfer(action: Action, places: _Places, ranks: Sequence[int]) -> None:
    """A transfer with its other half, sent after its tensor is made, received before it is needed."""
    kind, stage, m = action
    if kind in COMPUTATIONS:
        receive = receive_before(action, ranks)
        if receive is not None and receive not in places:
            raise _fault(action, places, f"needs {receive}, which is missing")
        if receive is not None and _before(action, receive, places):
            raise _fault(receive, places, f"stands after {action}, which needs it")
    elif kind in SENDS:
        made = _standing(Action(Kind.FORWARD if kind is Kind.SEND_ACTIVATION else Kind.INPUT_GRADIENT, stage, m), places)
        if _before(action, made, places):
            raise _fault(action, places, f"sends what is not computed yet: {made} stands after it")
        if receive_of(action) not in places:
            raise _fault(action, places, f"is never received: rank {ranks[peer_stage(action)]} has no {receive_of(action)}")
    else:
        send = Action(Kind.SEND_ACTIVATION if kind is Kind.RECEIVE_ACTIVATION else Kind.SEND_GRADIENT, peer_stage(action), m)
        if send not in places:
            raise _fault(action, places, f"is never sent: rank {ranks[send.stage]} has no {send}")


def _standing(made: Action, places: _Places) -> Action:
    """A forward or an input gradient as it stands in the schedule: the latter may be part of a backward."""
    return made if made in places else made._replace(kind=Kind.BACKWARD)


def _channels(schedule: Schedule, ranks: Sequence[int]) -> dict[tuple[int, int], tuple[list[Action], list[Action]]]:
    """By (from, to): the sends and the receives between two ranks, in the order of each end."""
    channels: dict[tuple[int, int], tuple[list[Action], list[Action]]] = defaultdict(lambda: ([], []))
    for rank, actions in enumerate(schedule):
        for action in actions:
            if action.kind in SENDS:
                channels[rank, ranks[peer_stage(action)]][0].append(action)
            elif action.kind not in COMPUTATIONS:
                channels[ranks[peer_stage(action)], rank][1].append(action)
    return channels


def _check_channels(channels: dict[tuple[int, int], tuple[list[Action], list[Action]]], places: _Places) -> None:
    """Receives in the order of the sends."""
    for (source, _), (sends, receives) in channels.items():
        for send, receive in zip(sends, receives, strict=True):
            if receive_of(send) != receive:
                at = places[send][1]
                raise _fault(receive, places, f"is out of order: rank {source} sends {send} (position {at}) at that turn")


def _execute(schedule: Schedule, ranks: Sequence[int]) -> None:
    """Move every rank as far as it goes until all are done or none can move."""
    position = [0] * len(schedule)
    sent: set[Action] = set()  # named by their receives, as are the posted
    posted: set[Action] = set()
    under_way: list[deque[Action]] = [deque() for _ in schedule]

    def waits_for(rank: int, action: Action) -> str | None:
        """Runs the action and returns None, or says what it has to wait for."""
        if action.kind in SENDS:
            while under_way[rank] and under_way[rank][0] in posted:
                under_way[rank].popleft()
            if len(under_way[rank]) >= len(ranks):
                oldest = under_way[rank][0]
                return f"{len(ranks)} sends are under way and rank {ranks[oldest.stage]} has not reached {oldest}"
            under_way[rank].append(receive_of(action))
            sent.add(receive_of(action))
        elif action.kind in COMPUTATIONS:
            receive = receive_before(action, ranks)
            if receive is not None and receive not in sent:
                return f"rank {ranks[peer_stage(receive)]} does not come to send it its input"
        else:
            posted.add(action)
        return None

    def advance(rank: int) -> bool:
        start, actions = position[rank], schedule[rank]
        while position[rank] < len(actions) and waits_for(rank, actions[position[rank]]) is None:
            position[rank] += 1
        return position[rank] > start

    while any(advance(rank) for rank in range(len(schedule))):
        pass
    for rank, actions in enumerate(schedule):
        if position[rank] < len(actions):
            action = actions[position[rank]]
            raise ScheduleError(f"rank {rank}, position {position[rank]}: {action} waits for ever: {waits_for(rank, action)}")


def _peak(actions: Sequence[Action]) -> int:
    live = most = 0
    for action in actions:
        live += (action.kind is Kind.FORWARD) - (action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT))
        most = max(most, live)
    return most


def _before(action: Action, other: Action, places: _Places) -> bool:
    return places[action][1] < places[other][1]


def _fault(action: Action, places: _Places, reason: str) -> ScheduleError:
    rank, position = places[action]
    return ScheduleError(f"rank {rank}, position {position}: {action} {reason}")
