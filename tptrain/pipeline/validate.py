"""Proof that a schedule can run, before it runs.

`validate` executes the action lists against channels, one for each (sending stage, receiving stage, direction), that
deliver in order. As in the engine, a rank stops at a computation until its input has arrived, and at a send while as many of its
sends as there are stages still wait for their receive; at nothing else.
If no rank can move, the schedule would hang; every other fault is found on the way.
"""

from __future__ import annotations

from collections import defaultdict, deque

from tptrain.pipeline.actions import Action, Kind, Schedule, ScheduleError


def validate(schedule: Schedule, micro_batches: int, backward: bool = True) -> list[int]:
    """Check a schedule with transfers. Returns each rank's peak of live activations, in micro-batches.

    Raises ScheduleError unless every stage runs each micro-batch's forward (and with `backward` its backward) exactly
    once, a backward follows its forward, sends and receives pair up in order, and no rank waits for ever.
    """
    _check_complete(schedule, micro_batches, backward)
    return _Execution(schedule, backward).run()


def _check_complete(schedule: Schedule, micro_batches: int, backward: bool) -> None:
    """Every computation exactly once, on its own rank."""
    kinds = (Kind.FORWARD, Kind.BACKWARD) if backward else (Kind.FORWARD,)
    for rank, actions in enumerate(schedule):
        seen: set[Action] = set()
        for position, action in enumerate(actions):
            if action in seen:
                raise ScheduleError(f"rank {rank}, position {position}: {action} stands twice")
            if action.stage != rank:
                raise ScheduleError(f"rank {rank}, position {position}: {action} belongs to rank {action.stage}")
            if action.micro_batch not in range(micro_batches):
                raise ScheduleError(f"rank {rank}, position {position}: {action} is of a micro-batch that does not exist")
            if action.kind is Kind.BACKWARD and not backward:
                raise ScheduleError(f"rank {rank}, position {position}: {action} has no place in a schedule without backward")
            seen.add(action)
        for kind in kinds:
            for m in range(micro_batches):
                if Action(kind, rank, m) not in seen:
                    raise ScheduleError(f"rank {rank}: {Action(kind, rank, m)} is missing")


class _Execution:
    """The action lists, run against channels."""

    def __init__(self, schedule: Schedule, backward: bool) -> None:
        self.schedule, self.backward = schedule, backward
        self.last_stage = len(schedule) - 1
        self.position = [0] * len(schedule)
        self.sent: dict[tuple[int, int], deque[int]] = defaultdict(deque)  # micro-batches on the way, by (from, to)
        self.posted: dict[tuple[int, int], deque[int]] = defaultdict(deque)  # receives waiting, by (from, to)
        self.arrived: set[tuple[Kind, int, int]] = set()
        self.done: set[Action] = set()
        self.live = [0] * len(schedule)
        self.peak = [0] * len(schedule)

    def run(self) -> list[int]:
        """Move every rank as far as it goes until all are done or none can move."""
        while any(self._advance(rank) for rank in range(len(self.schedule))):
            pass
        for rank, actions in enumerate(self.schedule):
            if self.position[rank] < len(actions):
                action = actions[self.position[rank]]
                raise ScheduleError(f"rank {rank}, position {self.position[rank]}: {action} waits for ever")
        for (source, target), micro_batches in self.sent.items():
            if micro_batches:
                raise ScheduleError(f"rank {target}: never receives micro-batch {micro_batches[0]} that rank {source} sends")
        for (source, target), micro_batches in self.posted.items():
            if micro_batches:
                raise ScheduleError(f"rank {target}: receives micro-batch {micro_batches[0]} that rank {source} never sends")
        return self.peak

    def _advance(self, rank: int) -> bool:
        """Run the rank's actions up to the first that must wait. True if it moved."""
        start = self.position[rank]
        actions = self.schedule[rank]
        while self.position[rank] < len(actions) and self._execute(rank, actions[self.position[rank]]):
            self.position[rank] += 1
        return self.position[rank] > start

    def _execute(self, rank: int, action: Action) -> bool:
        """Run one action. False if it has to wait."""
        kind, stage, m = action
        if kind in (Kind.FORWARD, Kind.BACKWARD):
            return self._compute(rank, action)
        if kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT):
            made = Kind.FORWARD if kind is Kind.SEND_ACTIVATION else Kind.BACKWARD
            if Action(made, stage, m) not in self.done:
                raise ScheduleError(f"rank {rank}, position {self.position[rank]}: {action} sends what is not computed yet")
            under_way = sum(len(sent) for (source, _), sent in self.sent.items() if source == stage)
            if under_way >= len(self.schedule):
                return False
            target = stage + 1 if kind is Kind.SEND_ACTIVATION else stage - 1
            self.sent[stage, target].append(m)
            self._match(rank, stage, target)
        else:
            source = stage - 1 if kind is Kind.RECEIVE_ACTIVATION else stage + 1
            self.posted[source, stage].append(m)
            self._match(rank, source, stage)
        return True

    def _compute(self, rank: int, action: Action) -> bool:
        kind, stage, m = action
        if kind is Kind.FORWARD:
            if stage > 0 and (Kind.RECEIVE_ACTIVATION, stage, m) not in self.arrived:
                return False
            self.live[rank] += 1 if self.backward else 0
            self.peak[rank] = max(self.peak[rank], self.live[rank])
        else:
            if Action(Kind.FORWARD, stage, m) not in self.done:
                raise ScheduleError(f"rank {rank}, position {self.position[rank]}: {action} stands before its forward")
            if stage < self.last_stage and (Kind.RECEIVE_GRADIENT, stage, m) not in self.arrived:
                return False
            self.live[rank] -= 1
        self.done.add(action)
        return True

    def _match(self, rank: int, source: int, target: int) -> None:
        """Deliver the oldest send of a channel to its oldest receive."""
        sent, posted = self.sent[source, target], self.posted[source, target]
        while sent and posted:
            if sent[0] != posted[0]:
                raise ScheduleError(
                    f"rank {rank}, position {self.position[rank]}: rank {target} receives micro-batch {posted[0]} "
                    f"where rank {source} sends micro-batch {sent[0]}"
                )
            kind = Kind.RECEIVE_ACTIVATION if source < target else Kind.RECEIVE_GRADIENT
            self.arrived.add((kind, target, sent.popleft()))
            posted.popleft()
