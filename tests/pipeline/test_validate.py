"""A corpus of broken schedules, each refused with the rank, the position and the reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tptrain.pipeline.actions import Action, Kind, Schedule, ScheduleError, with_transfers
from tptrain.pipeline.schedules import forward_only, gpipe, one_forward_one_backward
from tptrain.pipeline.validate import validate

KINDS = {kind.value: kind for kind in Kind}


def parse(text: str) -> Action:
    """`1SB0` is stage 1's sending of micro-batch 0's gradient."""
    stage, kind, micro_batch = re.fullmatch(r"(\d+)([A-Z]+)(\d+)", text).groups()
    return Action(KINDS[kind], int(stage), int(micro_batch))


def schedule_of(*ranks: str) -> Schedule:
    return [[parse(word) for word in rank.split()] for rank in ranks]


# Two stages, two micro-batches, as with_transfers(one_forward_one_backward(2, 1, 2)) makes them.
FIRST = "0F0 0SF0 0RB0 0F1 0SF1 0RB1 0B0 0B1"
SECOND = "1RF0 1F0 1RF1 1B0 1SB0 1F1 1B1 1SB1"

BROKEN = {
    "a backward is missing": (FIRST.replace(" 0B1", ""), SECOND, "rank 0: 0B1 is missing"),
    "a forward is missing": (FIRST, SECOND.replace("1F1 ", ""), "rank 1: 1F1 is missing"),
    "a forward stands twice": (FIRST.replace("0F1", "0F0"), SECOND, "rank 0, position 3: 0F0 stands twice"),
    "a receive stands twice": (FIRST, SECOND.replace("1RF1", "1RF0"), "rank 1, position 2: 1RF0 stands twice"),
    "an action of another rank": (FIRST.replace("0F1", "1F1"), SECOND, "rank 0, position 3: 1F1 belongs to rank 1"),
    "receives swapped": (
        FIRST, "1RF1 1F0 1RF0 1B0 1SB0 1F1 1B1 1SB1", "rank 1, position 0: rank 1 receives micro-batch 1 where rank 0 sends micro-batch 0"
    ),
    "gradient receives swapped": (
        "0F0 0SF0 0RB1 0F1 0SF1 0RB0 0B0 0B1", SECOND, "rank 1, position 4: rank 0 receives micro-batch 1 where rank 1 sends micro-batch 0"
    ),
    "sends swapped": (
        "0F0 0F1 0SF1 0SF0 0RB0 0RB1 0B0 0B1", SECOND, "rank 1, position 0: rank 1 receives micro-batch 0 where rank 0 sends micro-batch 1"
    ),
    "backward before forward": (FIRST, "1RF0 1B0 1SB0 1F0 1RF1 1F1 1B1 1SB1", "rank 1, position 1: 1B0 stands before its forward"),
    "sends before it computes": ("0SF0 " + FIRST.replace("0SF0 ", ""), SECOND, "rank 0, position 0: 0SF0 sends what is not computed"),
    "sends a gradient too early": (FIRST, SECOND.replace("1B0 1SB0", "1SB0 1B0"), "rank 1, position 3: 1SB0 sends what is not computed"),
    "an activation is never sent": (FIRST.replace("0SF1 ", ""), SECOND, "rank 0, position 6: 0B1 waits for ever"),
    "a gradient is never sent": (FIRST, SECOND.replace("1SB0 ", "").replace(" 1SB1", ""), "rank 0, position 6: 0B0 waits for ever"),
    "the last gradient is never sent": (FIRST, SECOND.replace(" 1SB1", ""), "rank 0, position 7: 0B1 waits for ever"),
    "an activation is never received": (FIRST, SECOND.replace("1RF1 ", ""), "rank 0, position 7: 0B1 waits for ever"),
    "a gradient is never received": (FIRST.replace("0RB1 ", ""), SECOND, "rank 0, position 6: 0B1 waits for ever"),
    "a receive comes after the computation that needs it": (FIRST, SECOND.replace("1RF0 1F0", "1F0 1RF0"), "rank 0, position 6: 0B0 waits"),
    "each waits for the other": ("0F0 0RB0 0B0 0SF0 0F1 0SF1 0RB1 0B1", SECOND, "rank 0, position 2: 0B0 waits for ever"),
    "a send beyond the last stage": (FIRST, SECOND + " 1SF0", "rank 2: never receives micro-batch 0 that rank 1 sends"),
    "a receive from before the first stage": ("0RF0 " + FIRST, SECOND, "rank 0: receives micro-batch 0 that rank -1 never sends"),
}  # fmt: skip


def test_what_the_corpus_is_made_from_is_right() -> None:
    good = schedule_of(FIRST, SECOND)
    assert good == with_transfers(one_forward_one_backward(2, 1, 2))
    assert validate(good, 2) == [2, 1]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_schedules_are_refused(name: str) -> None:
    first, second, reason = BROKEN[name]
    with pytest.raises(ScheduleError, match=re.escape(reason)):
        validate(schedule_of(first, second), 2)


def drop(schedule: Schedule, rank: int, position: int) -> None:
    del schedule[rank][position]


def double(schedule: Schedule, rank: int, position: int) -> None:
    schedule[rank].insert(position, schedule[rank][position])


def hand_on(schedule: Schedule, rank: int, position: int) -> None:
    schedule[(rank + 1) % len(schedule)].append(schedule[rank].pop(position))


@pytest.mark.parametrize("breakage", [drop, double, hand_on])
@pytest.mark.parametrize("make", [gpipe, one_forward_one_backward])
def test_no_single_action_can_go(make: Callable[[int, int, int], Schedule], breakage: Callable[[Schedule, int, int], None]) -> None:
    """Each action of a good schedule dropped, doubled, or given to another rank."""
    for rank, actions in enumerate(with_transfers(make(3, 1, 4))):
        for position in range(len(actions)):
            schedule = with_transfers(make(3, 1, 4))
            breakage(schedule, rank, position)
            with pytest.raises(ScheduleError, match=r"^rank \d+"):
                validate(schedule, 4)


def test_evaluation_has_no_backward() -> None:
    assert validate(with_transfers(forward_only(range(3), 4)), 4, backward=False) == [0, 0, 0], "nothing is kept"
    with pytest.raises(ScheduleError, match="rank 0: 0B0 is missing"):
        validate(with_transfers(forward_only(range(3), 4)), 4)


def test_more_or_fewer_micro_batches_than_promised() -> None:
    with pytest.raises(ScheduleError, match="rank 0: 0F4 is missing"):
        validate(with_transfers(gpipe(2, 1, 4)), 5)
    with pytest.raises(ScheduleError, match=r"rank 0, position \d+: 0F4 is of a micro-batch that does not exist"):
        validate(with_transfers(gpipe(2, 1, 5)), 4)


def test_a_backward_in_an_evaluation() -> None:
    with pytest.raises(ScheduleError, match=r"rank 0, position \d+: 0B0 has no place in a schedule without backward"):
        validate(with_transfers(gpipe(2, 1, 2)), 2, backward=False)


def test_sends_that_nobody_takes_in_time() -> None:
    """Two ranks that each send more than may be under way before they receive: each would wait for the other."""
    forward, backward = [Action(Kind.FORWARD, 0, m) for m in range(6)], [Action(Kind.BACKWARD, 0, m) for m in range(6)]
    late = [action._replace(kind=Kind.RECEIVE_GRADIENT) for action in backward]
    first = [step for action in forward for step in (action, action._replace(kind=Kind.SEND_ACTIVATION))] + late + backward
    second = [action._replace(stage=1, kind=Kind.RECEIVE_ACTIVATION) for action in forward]
    second += [Action(kind, 1, m) for m in range(6) for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.SEND_GRADIENT)]
    assert validate([first, second], 6) == [6, 1], "receives posted at once take everything"
    slow = [Action(kind, 1, m) for m in range(6) for kind in (Kind.RECEIVE_ACTIVATION, Kind.FORWARD, Kind.BACKWARD, Kind.SEND_GRADIENT)]
    with pytest.raises(ScheduleError, match="waits for ever"):
        validate([first, slow], 6)
