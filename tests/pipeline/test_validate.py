"""A corpus of broken schedules, each refused with the rank, the position and the reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise, permutations
from random import Random
from time import process_time

import pytest

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
    with_transfers,
)
from tptrain.pipeline.schedules import SCHEDULES, forward_only, gpipe, interleaved, one_forward_one_backward
from tptrain.pipeline.validate import check_computations, validate

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
    "an action of another rank": (FIRST.replace("0B1", "1B1"), SECOND, "rank 0, position 7: 1B1 is of a stage that rank 1 holds"),
    "a stage on two ranks": (FIRST, SECOND.replace("1F1", "0F1"), "rank 1, position 5: 0F1 is of a stage that rank 0 holds"),
    "a stage on no rank": (FIRST, SECOND + " 2B0", "rank 1, position 8: 2B0 is of a stage that has no forward on any rank"),
    "a micro-batch too many": (FIRST + " 0F2", SECOND, "rank 0, position 8: 0F2 is of a micro-batch that does not exist: there are 2"),
    "receives swapped": (
        FIRST, "1RF1 1F0 1RF0 1B0 1SB0 1F1 1B1 1SB1", "rank 1, position 2: 1RF0 stands after 1F0, which needs it"
    ),
    "early receives swapped": (
        FIRST, "1RF1 1RF0 1F0 1B0 1SB0 1F1 1B1 1SB1",
        "rank 1, position 0: 1RF1 is out of order: rank 0 sends 0SF0 (position 1) at that turn"
    ),
    "gradient receives swapped": (
        "0F0 0SF0 0RB1 0F1 0SF1 0RB0 0B0 0B1", SECOND,
        "rank 0, position 2: 0RB1 is out of order: rank 1 sends 1SB0 (position 4) at that turn"
    ),
    "sends swapped": (
        "0F0 0F1 0SF1 0SF0 0RB0 0RB1 0B0 0B1", SECOND,
        "rank 1, position 0: 1RF0 is out of order: rank 0 sends 0SF1 (position 2) at that turn"
    ),
    "backward before forward": (FIRST, "1RF0 1B0 1SB0 1F0 1RF1 1F1 1B1 1SB1", "rank 1, position 1: 1B0 stands before its forward"),
    "sends before it computes": (
        "0SF0 " + FIRST.replace("0SF0 ", ""), SECOND, "rank 0, position 0: 0SF0 sends what is not computed yet: 0F0 stands after it"
    ),
    "sends a gradient too early": (
        FIRST, SECOND.replace("1B0 1SB0", "1SB0 1B0"), "rank 1, position 3: 1SB0 sends what is not computed yet: 1B0 stands after it"
    ),
    "an activation is never sent": (FIRST.replace("0SF1 ", ""), SECOND, "rank 1, position 2: 1RF1 is never sent: rank 0 has no 0SF1"),
    "gradients are never sent": (
        FIRST, SECOND.replace("1SB0 ", "").replace(" 1SB1", ""), "rank 0, position 2: 0RB0 is never sent: rank 1 has no 1SB0"
    ),
    "the last gradient is never sent": (FIRST, SECOND.replace(" 1SB1", ""), "rank 0, position 5: 0RB1 is never sent: rank 1 has no 1SB1"),
    "an activation is never received": (
        FIRST, SECOND.replace("1RF1 ", ""), "rank 0, position 4: 0SF1 is never received: rank 1 has no 1RF1"
    ),
    "a gradient is never received": (FIRST.replace("0RB1 ", ""), SECOND, "rank 0, position 6: 0B1 needs 0RB1, which is missing"),
    "neither sent nor received": (
        FIRST.replace("0SF1 ", ""), SECOND.replace("1RF1 ", ""), "rank 1, position 4: 1F1 needs 1RF1, which is missing"
    ),
    "a receive comes after the computation that needs it": (
        FIRST, SECOND.replace("1RF0 1F0", "1F0 1RF0"), "rank 1, position 1: 1RF0 stands after 1F0, which needs it"
    ),
    "each waits for the other": (
        "0F0 0RB0 0B0 0SF0 0F1 0SF1 0RB1 0B1", SECOND, "rank 0, position 2: 0B0 waits for ever: rank 1 does not come to send it its input"
    ),
    "a send beyond the last stage": (FIRST, SECOND + " 1SF0", "rank 1, position 8: 1SF0 has no stage 2 at its other end"),
    "a receive from before the first stage": ("0RF0 " + FIRST, SECOND, "rank 0, position 0: 0RF0 has no stage -1 at its other end"),
    "a part of a backward besides": (FIRST + " 0W0", SECOND, "rank 0, position 8: 0W0 stands beside 0B0, which contains it"),
}  # fmt: skip


# Two stages a rank in a V, 0 and 3 and 1 and 2; one micro-batch, its backwards split. By hand.
OUTSIDE = "0F0 0SF0 3RF0 3F0 3I0 3SB0 3W0 0RB0 0I0 0W0"
INSIDE = "1RF0 1F0 2F0 2SF0 2RB0 2I0 1I0 1SB0 1W0 2W0"

BROKEN_V = {
    "W before I": (OUTSIDE.replace("3I0 3SB0 3W0", "3W0 3I0 3SB0"), INSIDE, "rank 0, position 4: 3W0 stands before its input gradient"),
    "I before F": (OUTSIDE, "1RF0 1F0 2RB0 2I0 2F0 2SF0 1I0 1SB0 1W0 2W0", "rank 1, position 3: 2I0 stands before its forward"),
    "I without W": (OUTSIDE.replace("3W0 ", ""), INSIDE, "rank 0: 3W0 is missing"),
    "W without I": (OUTSIDE.replace("3I0 ", ""), INSIDE, "rank 0: 3I0 is missing"),
    "neither B nor I and W": (OUTSIDE.replace("3I0 3SB0 3W0 ", ""), INSIDE, "rank 0: 3B0 is missing"),
    "B and I both": (OUTSIDE, INSIDE + " 1B0", "rank 1, position 6: 1I0 stands beside 1B0, which contains it"),
    "W twice": (OUTSIDE, INSIDE + " 1W0", "rank 1, position 10: 1W0 stands twice"),
    "a stage on two ranks": (OUTSIDE, INSIDE + " 3F0", "rank 1, position 10: 3F0 is of a stage that rank 0 holds"),
    "a stage between on no rank": (OUTSIDE, INSIDE.replace("2F0 ", ""), "stage 2 has no forward on any rank"),
    "a forward before its neighbour's on the rank": (
        OUTSIDE, INSIDE.replace("1F0 2F0", "2F0 1F0"), "rank 1, position 1: 2F0 stands before 1F0, which makes its input"
    ),
    "an input gradient before its neighbour's on the rank": (
        OUTSIDE, INSIDE.replace("2I0 1I0 1SB0", "1I0 1SB0 2I0"), "rank 1, position 5: 1I0 stands before 2I0, which makes its input"
    ),
    "a backward before its neighbour's on the rank": (
        OUTSIDE, INSIDE.replace("2I0 1I0 1SB0 1W0 2W0", "1B0 1SB0 2B0"), "rank 1, position 5: 1B0 stands before 2B0, which makes its input"
    ),
    "a send to itself": (
        OUTSIDE, INSIDE.replace("1F0 2F0", "1F0 1SF0 2F0"), "rank 1, position 2: 1SF0 has the same rank at its other end, in stage 2"
    ),
    "a receive from itself": (
        OUTSIDE, INSIDE.replace("1F0 2F0", "1F0 2RF0 2F0"), "rank 1, position 2: 2RF0 has the same rank at its other end, in stage 1"
    ),
    "sends before I": (
        OUTSIDE.replace("3I0 3SB0", "3SB0 3I0"), INSIDE, "rank 0, position 4: 3SB0 sends what is not computed yet: 3I0 stands after it"
    ),
    "an activation and a gradient out of order": (
        OUTSIDE.replace("0RB0 ", "").replace("3RF0", "0RB0 3RF0"), INSIDE,
        "rank 0, position 2: 0RB0 is out of order: rank 1 sends 2SF0 (position 3) at that turn",
    ),
    "a cycle": (
        "0F0 0SF0 3RF0 0RB0 0I0 0W0 3F0 3I0 3SB0 3W0", INSIDE,
        "rank 0, position 4: 0I0 waits for ever: rank 1 does not come to send it its input",
    ),
}  # fmt: skip


def test_what_the_corpus_is_made_from_is_right() -> None:
    good = schedule_of(FIRST, SECOND)
    assert good == with_transfers(one_forward_one_backward(2, 1, 2))
    assert validate(good, 2) == [2, 1]
    assert validate(schedule_of(OUTSIDE, INSIDE), 1) == [2, 2], "both stages', until the weight gradients"
    merged = INSIDE.replace("2I0", "2B0").replace("1I0", "1B0").replace(" 1W0 2W0", "")
    assert validate(schedule_of(OUTSIDE, merged), 1) == [2, 2], "each stage's backward may be whole or in parts"
    assert validate(schedule_of("0F0 0I0 0F1 0I1 0W0 0W1"), 2) == [2], "not until the input gradient"


@pytest.mark.parametrize("name", BROKEN)
def test_broken_schedules_are_refused(name: str) -> None:
    first, second, reason = BROKEN[name]
    with pytest.raises(ScheduleError, match="^" + re.escape(reason)):
        validate(schedule_of(first, second), 2)


@pytest.mark.parametrize("name", BROKEN_V)
def test_broken_schedules_of_two_stages_a_rank_are_refused(name: str) -> None:
    first, second, reason = BROKEN_V[name]
    with pytest.raises(ScheduleError, match="^" + re.escape(reason)):
        validate(schedule_of(first, second), 1)


def drop(schedule: Schedule, rank: int, position: int) -> None:
    del schedule[rank][position]


def double(schedule: Schedule, rank: int, position: int) -> None:
    schedule[rank].insert(position, schedule[rank][position])


def hand_on(schedule: Schedule, rank: int, position: int) -> None:
    schedule[(rank + 1) % len(schedule)].append(schedule[rank].pop(position))


@pytest.mark.parametrize("breakage", [drop, double, hand_on])
@pytest.mark.parametrize(
    ("name", "stages_per_rank"), [("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2)]
)
def test_no_single_action_can_go(name: str, stages_per_rank: int, breakage: Callable[[Schedule, int, int], None]) -> None:
    """Each action of a good schedule dropped, doubled, or given to another rank."""
    good = with_transfers(SCHEDULES[name](3, stages_per_rank, 4))
    for rank, actions in enumerate(good):
        for position in range(len(actions)):
            schedule = [list(actions) for actions in good]
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
    with pytest.raises(ScheduleError, match=r"^rank 0, position 2: 0RB0 has no place in a schedule without backward"):
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
    # Rank 1 sends the gradients of 0 and 1 and stops at that of 2, having received 0, 1 and 2; rank 0 sends two more, 3 and 4.
    reason = "rank 0, position 11: 0SF5 waits for ever: 2 sends are under way and rank 1 has not reached 1RF3"
    with pytest.raises(ScheduleError, match=f"^{reason}$"):
        validate([first, slow], 6)


def test_only_the_oldest_send_makes_room() -> None:
    """Three stages, three sends under way. Rank 1 sends a gradient that rank 0 has not come to, then activations that rank 2 takes
    at once: the engine lets go of sends in their order, so the fourth has to wait, and rank 0 with it."""
    first = [word for m in range(8) for word in (f"0F{m}", f"0SF{m}")] + [word for m in range(8) for word in (f"0RB{m}", f"0B{m}")]
    second = ["1RF0 1F0 1SF0 1RB0 1B0 1SB0", *(f"1RF{m} 1F{m} 1SF{m}" for m in range(1, 8)), *(f"1RB{m} 1B{m} 1SB{m}" for m in range(1, 8))]
    third = ["2RF0 2F0 2B0 2SB0", *(f"2RF{m} 2F{m}" for m in range(1, 8)), *(f"2B{m} 2SB{m}" for m in range(1, 8))]
    reason = "rank 0, position 15: 0SF7 waits for ever: 3 sends are under way and rank 1 has not reached 1RF4"
    with pytest.raises(ScheduleError, match=f"^{reason}$"):
        validate(schedule_of(" ".join(first), " ".join(second), " ".join(third)), 8)
    first.insert(8, first.pop(16))  # 0RB0 in time
    assert validate(schedule_of(" ".join(first), " ".join(second), " ".join(third)), 8) == [8, 7, 7]


class _Graph:
    """Another way to the same answer: what must be before what, as a graph; a schedule can run if it has no cycle."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.ranks = schedule, placement(schedule)
        self.before: dict[Action, set[Action]] = {action: set() for actions in schedule for action in actions}

    def can_run(self) -> bool:
        for actions in self.schedule:
            for earlier, later in pairwise(actions):
                self.before[later].add(earlier)
            sends = [action for action in actions if action.kind in SENDS]
            for early, late in zip(sends, sends[len(self.ranks) :], strict=False):
                self.before[late].add(receive_of(early))  # a send starts when the one as many before it as there are stages is taken
            for send in sends:
                self.before[self.user(receive_of(send))] |= {send, receive_of(send)}
            for action in actions:
                self.before[action] |= {need for need in self.needs(action) if need in self.before}
        for source, target in permutations(range(len(self.schedule)), 2):
            sends = [a for a in self.schedule[source] if a.kind in SENDS and self.ranks[peer_stage(a)] == target]
            receives = [a for a in self.schedule[target] if a.kind in RECEIVES and self.ranks[peer_stage(a)] == source]
            if [receive_of(send) for send in sends] != receives:
                return False
        try:
            TopologicalSorter(self.before).prepare()
        except CycleError:
            return False
        return True

    def needs(self, action: Action) -> list[Action]:
        kind, s, m = action
        f, b, i = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT
        return {
            f: [Action(f, s - 1, m)],
            b: [Action(f, s, m), Action(b, s + 1, m), Action(i, s + 1, m)],
            i: [Action(f, s, m), Action(b, s + 1, m), Action(i, s + 1, m)],
            Kind.WEIGHT_GRADIENT: [Action(i, s, m)],
            Kind.SEND_ACTIVATION: [Action(f, s, m)],
            Kind.SEND_GRADIENT: [Action(b, s, m), Action(i, s, m)],
        }.get(kind, [])

    def user(self, receive: Action) -> Action:
        kinds = (Kind.FORWARD,) if receive.kind is Kind.RECEIVE_ACTIVATION else (Kind.BACKWARD, Kind.INPUT_GRADIENT)
        return next(action for kind in kinds if (action := receive._replace(kind=kind)) in self.before)


RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)


def moved(schedule: Schedule, random: Random) -> Schedule:
    """One to three actions taken to other places on their ranks, near ones mostly."""
    schedule = [list(actions) for actions in schedule]
    for _ in range(random.randint(1, 3)):
        actions = schedule[random.randrange(len(schedule))]
        action = actions.pop(random.randrange(len(actions)))
        actions.insert(random.randrange(len(actions) + 1), action)
    return schedule


def late_receives(schedule: Schedule) -> Schedule:
    """Each receive right before what needs it, as far as the order of the channel lets it: finite buffers fill up."""
    ranks = placement(schedule)
    result = []
    for actions in schedule:
        waiting, late = [action for action in actions if action.kind in RECEIVES], []
        for action in actions:
            if action.kind in RECEIVES:
                continue
            needed = receive_before(action, ranks) if action.kind in COMPUTATIONS else None
            if needed in waiting:
                source = ranks[peer_stage(needed)]
                channel = [receive for receive in waiting if ranks[peer_stage(receive)] == source]
                starting = channel[: channel.index(needed) + 1]
                waiting = [receive for receive in waiting if receive not in starting]
                late += starting
            late.append(action)
        result.append(late)
    return result


def test_the_validator_agrees_with_a_graph() -> None:
    """Good schedules with actions moved about, and with late receives: refused exactly if the graph has a cycle."""
    random = Random(0)
    verdicts: Counter[tuple[str, bool]] = Counter()
    for _ in range(1500):
        way = random.choice(["moved", "late", "both"])
        name = "gpipe" if way == "late" else random.choice(sorted(SCHEDULES))
        v = {"gpipe": random.randint(1, 3), "interleaved": random.randint(1, 3), "zb_v": 2}.get(name, 1)
        p, m = random.randint(1, 4), random.randint(1, 24 if way == "late" else 8)
        schedule = with_transfers(SCHEDULES[name](p, v, m))
        schedule = late_receives(schedule) if way != "moved" else schedule
        schedule = moved(schedule, random) if way != "late" else schedule
        expected = _Graph(schedule).can_run()
        verdicts[way, expected] += 1
        fault = fault_of(schedule, m)
        assert (fault is None) == expected, (name, p, v, m, fault)
        assert fault is None or re.match(r"rank \d+, position \d+: \d+[A-Z]+\d+ ", fault), "every fault of an order has its place"
    for way in ("moved", "late", "both"):
        assert min(verdicts[way, True], verdicts[way, False]) > 10, verdicts


def fault_of(schedule: Schedule, m: int) -> str | None:
    try:
        validate(schedule, m)
    except ScheduleError as error:
        return str(error)
    return None


def random_order(random: Random, ranks: list[int], m: int) -> Schedule:
    """Computations of stages that lie anywhere, in some order in which they can run, micro-batches in no order at all."""
    todo = {Action(Kind.FORWARD, stage, i) for stage in range(len(ranks)) for i in range(m)}
    for stage in range(len(ranks)):
        for i in range(m):
            kinds = random.choice([(Kind.BACKWARD,), (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)])
            todo |= {Action(kind, stage, i) for kind in kinds}
    graph = _Graph([[action for action in sorted(todo, key=str) if ranks[action.stage] == rank] for rank in range(max(ranks) + 1)])
    schedule: Schedule = [[] for _ in range(max(ranks) + 1)]
    while todo:
        ready = [action for action in sorted(todo, key=str) if not any(need in todo for need in graph.needs(action))]
        chosen = random.choice(ready)
        schedule[ranks[chosen.stage]].append(chosen)
        todo.remove(chosen)
    return schedule


def test_any_computations_that_can_run_also_run_with_transfers() -> None:
    """However many sends there are before the first receive that would be needed."""
    random = Random(0)
    for _ in range(150):
        p = random.randint(1, 4)
        ranks = [*range(p), *(random.randrange(p) for _ in range(random.randint(0, 4)))]
        random.shuffle(ranks)
        m = random.randint(1, 8)
        schedule = random_order(random, ranks, m)
        check_computations(schedule, m)
        complete = with_transfers(schedule)
        validate(complete, m)
        assert [[action for action in actions if action.kind in COMPUTATIONS] for actions in complete] == schedule
    complete = with_transfers(gpipe(2, 2, 24))
    assert _Graph(complete).can_run()
    assert not _Graph(late_receives(complete)).can_run(), "receives that start when they are needed would not do"


def test_check_computations_finds_cycles() -> None:
    """Position and rank are those of the list without transfers."""
    check_computations(schedule_of("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0"), 1)
    reason = "rank 0, position 1: 0B0 waits for ever: rank 1, which makes its input in stage 1, waits for others in turn"
    with pytest.raises(ScheduleError, match=f"^{reason}$"):
        check_computations(schedule_of("0F0 0B0 3F0 3B0", "1F0 2F0 2B0 1B0"), 1)
    with pytest.raises(ScheduleError, match=r"^rank 0, position 2: 0F0 stands twice$"):
        check_computations(schedule_of("0F0 0B0 0F0"), 1)


def test_it_is_fast() -> None:
    """16 ranks with 4 stages each and 64 micro-batches, 28 thousand actions: a fraction of a second."""
    schedule = with_transfers(interleaved(16, 4, 64))
    start = process_time()
    validate(schedule, 64)
    assert process_time() - start < 2
