"""Schedules as text: one line for each pipeline rank, its computations in order, each stage, kind and micro-batch.

    # 1f1b on two ranks, with the backward split on the second
    0F0 0F1 0B0 0B1
    1F0 1I0 1F1 1I1 1W0 1W1

Kinds: F forward, B backward, or its parts I (input gradient) and W (weight gradient). Everything counts from 0. A `#` starts a
comment; lines without computations do not count. Sends and receives follow from the computations (`actions.with_transfers`).
"""

from __future__ import annotations

import re

from tptrain.pipeline.actions import COMPUTATIONS, Action, Kind, Schedule, ScheduleError

_KINDS = {kind.value: kind for kind in Kind}
_WORD = re.compile(r"([0-9]{1,6})([A-Z]{1,2})([0-9]{1,6})")


def dumps(schedule: Schedule) -> str:
    """A schedule of computations as text. Raises ScheduleError for a rank without any, which has no line.

    >>> print(dumps([[Action(Kind.FORWARD, 0, 0), Action(Kind.BACKWARD, 0, 0)]]), end="")
    0F0 0B0
    """
    for rank, actions in enumerate(schedule):
        if not actions:
            raise ScheduleError(f"rank {rank} has no computation")
        for position, action in enumerate(actions):
            if action.kind not in COMPUTATIONS:
                raise ScheduleError(f"rank {rank}, position {position}: {action} is no computation")
    return "".join(" ".join(str(action) for action in actions) + "\n" for actions in schedule)


def loads(text: str) -> Schedule:
    """The schedule that a text holds. Raises ScheduleError with the line and the word, counted from 1, that is no computation."""
    schedule = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words:
            schedule.append([_action(word, f"line {number}, word {place}") for place, word in enumerate(words, start=1)])
    return schedule


def _action(word: str, where: str) -> Action:
    match = _WORD.fullmatch(word)
    kind = _KINDS.get(match[2]) if match else None
    if match is None or kind is None:
        raise ScheduleError(f"{where}: {word[:40]!r} is not a stage, one of F, B, I, W, and a micro-batch, as in 0F0")
    if kind not in COMPUTATIONS:
        raise ScheduleError(f"{where}: {word!r} is a transfer, which follows from the computations and is not written")
    return Action(kind, int(match[1]), int(match[3]))
