"""Schedules against the papers: order, peak of live activations, time; for every small size and many random ones."""

from __future__ import annotations

from collections import Counter
from random import Random
from types import ModuleType

import pytest

from tptrain.pipeline import schedules, zero_bubble
from tptrain.pipeline.actions import Action, Kind, Schedule, with_transfers
from tptrain.pipeline.schedules import SCHEDULES, forward_only, gpipe, interleaved, one_forward_one_backward
from tptrain.pipeline.simulate import Costs, simulate
from tptrain.pipeline.validate import check_computations, validate
from tptrain.pipeline.zero_bubble import zb_h1, zb_v

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 13)]  # fewer micro-batches than ranks, as many, and more
FORWARD, BACKWARD, INPUT, WEIGHT = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT
SPLIT = ("zb_h1", "zb_v")
EACH = {"1f1b": (1, 1), "zb_h1": (1, 1), "zb_v": (2, 2)}
"""Fewest and most stages a rank; of the others, any number."""


def rank_of(name: str, p: int, stage: int) -> int:
    return min(stage, 2 * p - 1 - stage) if name == "zb_v" else stage % p


def peaks(name: str, p: int, v: int, m: int) -> list[tuple[int, int]]:
    """For each rank, the fewest and the most that its peak may be, in micro-batches of one stage, by the papers.

    1f1b: Narayanan et al. 2021, section 2.2. interleaved: the forwards that a rank is ahead, and one. zb_h1: 1F1B's first stage.
    zb_v: 1F1B's too, in halves of it.
    """
    group = -(-m // max(1, m // p))  # the first, and largest
    return [
        {
            "gpipe": (m * v, m * v),
            "1f1b": (min(m, p - r),) * 2,
            "interleaved": (min(m * v, (v - 1) * group + 2 * (p - 1 - r) + 1),) * 2,
            "zb_h1": (1, min(m, p)),
            "zb_v": (1, min(2 * m, 2 * p)),
        }[name]
        for r in range(p)
    ]


def check(name: str, p: int, v: int, m: int) -> None:
    computations = SCHEDULES[name](p, v, m)
    kinds = (FORWARD, INPUT, WEIGHT) if name in SPLIT else (FORWARD, BACKWARD)
    expected = Counter(Action(kind, s, i) for kind in kinds for s in range(p * v) for i in range(m))
    assert Counter(action for rank in computations for action in rank) == expected, "each computation once, and nothing else"
    assert all(rank_of(name, p, action.stage) == rank for rank, actions in enumerate(computations) for action in actions)
    check_computations(computations, m)
    held = validate(with_transfers(computations), m)
    assert held == [held_most(actions) for actions in computations], "counted by hand"
    for most, (low, high) in zip(held, peaks(name, p, v, m), strict=True):
        assert low <= most <= high, (name, p, v, m)


def held_most(actions: list[Action]) -> int:
    live: set[tuple[int, int]] = set()
    most = 0
    for kind, stage, m in actions:
        if kind is FORWARD:
            live.add((stage, m))
        elif kind is not INPUT:
            live.remove((stage, m))
        most = max(most, len(live))
    assert not live
    return most


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_sizes(name: str) -> None:
    """Five hundred of each: as many micro-batches as ranks, fewer, more; one stage a rank and several."""
    random = Random(0)
    for _ in range(500):
        check(name, random.randint(1, 8), random.randint(*EACH.get(name, (1, 4))), random.randint(1, 24))


@pytest.mark.parametrize("name", SCHEDULES)
def test_large_sizes(name: str) -> None:
    for p, m in [(24, 60), (17, 96), (3, 90), (1, 50)]:
        check(name, p, EACH.get(name, (3, 3))[0], m)


def test_interleaving_one_stage_a_rank_is_1f1b_that_runs_further_ahead() -> None:
    assert interleaved(1, 1, 5) == one_forward_one_backward(1, 1, 5)
    assert words(interleaved(3, 1, 6)[1]) == "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5", "2 * (p - 1 - rank) ahead, not p - 1 - rank"


def test_interleaved_is_the_paper_s() -> None:
    """Narayanan et al. 2021, figure 4 (bottom), four ranks with two stages each, eight micro-batches counted from 0."""
    schedule = interleaved(4, 2, 8)
    assert " ".join(map(str, schedule[0])).startswith("0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0 0F7 4B1 4F4 4B2 4F5 4B3 4F6 0B0")
    assert " ".join(map(str, schedule[3])).startswith("3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1 7F2 7B2 7F3 7B3 3F4 3B0 3F5 3B1 3F6 3B2 3F7 3B3 7F4")


def test_interleaved_groups() -> None:
    """Of at least p, the larger ones first: five on two ranks are three and two; six on four are one group."""
    assert words(interleaved(4, 2, 6)[3][:6]) == "F0 F1 F2 F3 F4 F5"
    forwards = [action for action in interleaved(2, 2, 5)[1] if action.kind is FORWARD]
    assert [str(action) for action in forwards] == ["1F0", "1F1", "1F2", "3F0", "3F1", "3F2", "1F3", "1F4", "3F3", "3F4"]


def test_zb_h1_is_the_paper_s() -> None:
    """Qi et al. 2023, figure 3 (top): the last rank puts its weight gradients off so that it keeps as much as the first."""
    schedule = zb_h1(4, 1, 8)
    assert words(schedule[0]) == "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7"
    assert words(schedule[3]) == "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7"
    assert [held_most(actions) for actions in schedule] == [4, 4, 4, 4]


def test_zb_v_for_any_costs() -> None:
    """Stages that are not alike: still each computation once, in the same memory; of equal costs the unit does not matter."""
    random = Random(0)
    for _ in range(100):
        p, m = random.randint(1, 6), random.randint(1, 16)
        costs = Costs(*([random.randint(1, 9) for _ in range(2 * p)] for _ in range(3)))
        schedule = zb_v(p, 2, m, costs)
        assert Counter(a for rank in schedule for a in rank) == Counter(a for rank in zb_v(p, 2, m) for a in rank)
        assert max(validate(with_transfers(schedule), m)) <= 2 * p
        assert zb_v(p, 2, m, Costs([7] * 2 * p, [7] * 2 * p, [7] * 2 * p)) == zb_v(p, 2, m)


def test_zb_v_heeds_costs() -> None:
    """A head that costs as much as 2.7 blocks: the order that is made for it is the faster one, and no step is shorter than a rank's own
    work."""
    for sizes in ([2, 3, 2, 1], [2, 4, 1, 1], [3, 3, 3, 1]):
        forward = [100 * size + 270 * (stage == 3) for stage, size in enumerate(sizes)]
        costs = Costs(forward, [flops + 8 * size for flops, size in zip(forward, sizes, strict=True)], forward)
        made, unit = (simulate(schedule, costs).step_seconds for schedule in (zb_v(2, 2, 8, costs), zb_v(2, 2, 8)))
        own = max(8 * sum(part[stage] for part in (costs.forward, costs.input_gradient, costs.weight_gradient) for stage in pair)
                  for pair in ((0, 3), (1, 2)))  # fmt: skip
        assert own <= made < unit
        assert made < 1.03 * own


def test_input_gradients_come_in_1f1b_s_order() -> None:
    for p, m in SIZES:
        without = [[a._replace(kind=BACKWARD) if a.kind is INPUT else a for a in rank if a.kind is not WEIGHT] for rank in zb_h1(p, 1, m)]
        assert without == one_forward_one_backward(p, 1, m)


def words(actions: list[Action]) -> str:
    return " ".join(f"{action.kind.value}{action.micro_batch}" for action in actions)


def test_1f1b_is_the_paper_s() -> None:
    """Narayanan et al. 2021, figure 4 (top), four stages, eight micro-batches counted from 0."""
    schedule = one_forward_one_backward(4, 1, 8)
    assert words(schedule[0]) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7"
    assert words(schedule[2]) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7"
    assert words(schedule[3]) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7"


def test_1f1b_with_few_micro_batches() -> None:
    assert [words(actions) for actions in one_forward_one_backward(4, 1, 2)] == ["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"]
    assert [words(actions) for actions in one_forward_one_backward(3, 1, 1)] == ["F0 B0"] * 3
    assert [words(actions) for actions in one_forward_one_backward(1, 1, 3)] == ["F0 B0 F1 B1 F2 B2"]


def test_gpipe_is_the_paper_s() -> None:
    assert [words(actions) for actions in gpipe(2, 1, 3)] == ["F0 F1 F2 B0 B1 B2"] * 2
    assert [words(actions) for actions in forward_only(range(2), 3)] == ["F0 F1 F2"] * 2


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_time_is_the_papers_formula(name: str) -> None:
    """(m + p - 1) forwards and backwards long: a bubble of p - 1 of each, with a backward twice as long as a forward."""
    for p, m in SIZES:
        assert finish_time(SCHEDULES[name](p, 1, m), {FORWARD: 1, BACKWARD: 2}) == (m + p - 1) * 3, (p, m)


def test_interleaving_divides_the_bubble() -> None:
    """Groups of p: m * v stage-times and a bubble of p - 1, of stages that are v times smaller (Narayanan et al. 2021, section 2.2)."""
    for p in range(1, 9):
        for v in range(1, 5):
            for m in (p, 2 * p, 3 * p):
                assert finish_time(interleaved(p, v, m), {FORWARD: 1, BACKWARD: 2}) == (m * v + p - 1) * 3, (p, v, m)


ONE_EACH = {FORWARD: 1, INPUT: 1, WEIGHT: 1}


def test_zb_h1_s_bubble_is_a_third_of_1f1b_s() -> None:
    """3m + p - 1 (Qi et al. 2023, table 2: (p - 1)(F + I - W)). The last rank can't start sooner, and then has 3m units to do.

    With m < p the way is longer: the last rank has done F and I of all at p - 1 + 2m at the earliest, the last I comes to rank 0
    after p - 1 more, and its W takes one.
    """
    for p in range(1, 13):
        for m in range(1, 33):
            expected = max(3 * m + p - 1, 2 * m + 2 * p - 1)
            assert finish_time(zb_h1(p, 1, m), ONE_EACH) == expected, (p, m)


def test_zb_v_s_bubble_is_half_of_zb_h1_s() -> None:
    """6m + p - 1 of half the units. The last rank can't start sooner, and then has 6m units to do.

    With m = 1 the way is 2p forwards up and down the V, as many input gradients, and a weight gradient.
    """
    for p in range(1, 12):
        for m in (p, p + 1, p + 2, p + 3, 2 * p - 1, 2 * p, 3 * p + 1, 32):
            assert finish_time(zb_v(p, 2, m), ONE_EACH) == 6 * m + p - 1, (p, m)
        assert finish_time(zb_v(p, 2, 1), ONE_EACH) == 4 * p + 1 + (p == 1), p
        for m in range(2, p):
            assert finish_time(zb_v(p, 2, m), ONE_EACH) < 2 * finish_time(zb_h1(p, 1, m), ONE_EACH), (p, m)
    for p in (12, 14, 16):
        for m in (p, p + 4, 2 * p):
            assert finish_time(zb_v(p, 2, m), ONE_EACH) <= 6 * m + p - 1 + 5, (p, m)


def finish_time(schedule: Schedule, costs: dict[Kind, int]) -> int:
    """When the last rank is done if communication takes no time and each rank works in its order."""
    return max(end for spans in spans_of(schedule, costs) for _, _, end in spans)


def spans_of(schedule: Schedule, costs: dict[Kind, int]) -> list[list[tuple[Action, int, int]]]:
    """Each rank's computations with their start and end."""
    last = max(action.stage for actions in schedule for action in actions)
    done: dict[tuple[str, int, int], int] = {}  # when a stage's activation, or its input's gradient, of a micro-batch is there
    spans: list[list[tuple[Action, int, int]]] = [[] for _ in schedule]
    while any(len(spans[rank]) < len(actions) for rank, actions in enumerate(schedule)):
        moved = False
        for rank, actions in enumerate(schedule):
            for kind, s, m in actions[len(spans[rank]) :]:
                needs = {FORWARD: [("activation", s - 1, m)] * (s > 0), WEIGHT: [("gradient", s, m)]}.get(
                    kind, [("activation", s, m)] + [("gradient", s + 1, m)] * (s < last)
                )
                if not all(need in done for need in needs):
                    break
                start = max([spans[rank][-1][2] if spans[rank] else 0, *(done[need] for need in needs)])
                spans[rank].append((Action(kind, s, m), start, start + costs[kind]))
                if kind is not WEIGHT:
                    done["activation" if kind is FORWARD else "gradient", s, m] = start + costs[kind]
                moved = True
        assert moved, "no rank can go on"
    return spans


@pytest.mark.parametrize(
    ("module", "name", "p", "v", "m"),
    [
        (schedules, "gpipe", 3, 1, 4),
        (schedules, "1f1b", 3, 1, 4),
        (schedules, "interleaved", 2, 2, 4),
        (zero_bubble, "zb_h1", 3, 1, 4),
        (zero_bubble, "zb_v", 2, 2, 3),
    ],
)
def test_the_pictures_are_true(module: ModuleType, name: str, p: int, v: int, m: int) -> None:
    """Those in the docstrings, drawn again with one column a computation."""
    assert module.__doc__ is not None
    picture = module.__doc__.partition(f"    {name}, ")[2].splitlines()
    assert picture[0].startswith(f"p={p}, {f'v={v}, ' * (name == 'interleaved')}m={m}")
    drawn = [line.partition(" rank ")[2][3:] for line in picture if " rank " in line and ";" not in line][:p]
    for rank, spans in enumerate(spans_of(SCHEDULES[name](p, v, m), dict.fromkeys(Kind, 1))):
        text = [str(action) if v > 1 else str(action)[1:] for action, _, _ in spans]
        row = ""
        for word, (_, start, _) in zip(text, spans, strict=True):
            row = row.ljust(start * (len(word) + 1)) + word
        assert drawn[rank] == row


def test_transfers_surround_their_computations() -> None:
    """Sent as soon as made; received one computation ahead, so that the transfer runs beside it. 1f1b, two stages, two micro-batches."""
    first, second = with_transfers(one_forward_one_backward(2, 1, 2))
    assert words(first) == "F0 SF0 RB0 F1 SF1 RB1 B0 B1"
    assert words(second) == "RF0 F0 RF1 B0 SB0 F1 B1 SB1"
    assert [words(actions) for actions in with_transfers(gpipe(1, 1, 2))] == ["F0 F1 B0 B1"], "one stage talks to nobody"
    assert str(Action(Kind.SEND_GRADIENT, 3, 11)) == "3SB11"


@pytest.mark.parametrize("name", [*SCHEDULES, "forward_only"])
def test_each_transfer_has_its_other_half(name: str) -> None:
    """Between neighbouring stages on different ranks, and no others."""
    for p, m in SIZES:
        training = name != "forward_only"
        v = EACH.get(name, (1, 1))[0]
        schedule = with_transfers(SCHEDULES[name](p, v, m) if training else forward_only(range(p), m))
        counted = Counter(action for actions in schedule for action in actions)
        crossing = [s for s in range(p * v - 1) if rank_of(name, p, s) != rank_of(name, p, s + 1)]
        for i in range(m):
            for s in crossing:
                assert counted[Action(Kind.SEND_ACTIVATION, s, i)] == counted[Action(Kind.RECEIVE_ACTIVATION, s + 1, i)] == 1
                assert counted[Action(Kind.SEND_GRADIENT, s + 1, i)] == counted[Action(Kind.RECEIVE_GRADIENT, s, i)] == training
        computations = m * p * v * (3 if name in SPLIT else 2 if training else 1)
        assert sum(counted.values()) == computations + m * 2 * len(crossing) * (2 if training else 1)
        if not training:
            validate(schedule, m, backward=False)


def test_evaluation_wherever_the_stages_are() -> None:
    """Any number of micro-batches: what a rank receives for a later stage of its own waits while it runs an earlier one."""
    for ranks in ([0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 0], [0, 0, 1, 2], [0, 1, 0, 1, 0, 1, 0, 1]):
        for m in (1, 3, 40):
            assert validate(with_transfers(forward_only(ranks, m)), m, backward=False) == [0] * (max(ranks) + 1)


@pytest.mark.parametrize("ranks", [range(4), [0, 1, 2, 3] * 3, [0, 1, 2, 3, 3, 2, 1, 0]], ids=["line", "ring", "V"])
def test_forwards_alone_pile_nothing_up(ranks: list[int]) -> None:
    """Between two stages wait at most as many activations as the pipeline is long, not as many as there are micro-batches; and ranks
    wait no longer than it takes to fill and to empty the pipeline."""
    m, stages = 100, len(ranks)
    costs = Costs([1] * stages, [1] * stages, [1] * stages)
    step = simulate(forward_only(ranks, m), costs)
    ends = {span.action: span.end for spans in step.timeline for span in spans}
    starts = {span.action: span.start for spans in step.timeline for span in spans}
    for stage in range(stages - 1):
        made = [ends[Action(FORWARD, stage, i)] for i in range(m)]
        used = [starts[Action(FORWARD, stage + 1, i)] for i in range(m)]
        assert max(sum(end <= time for end in made) - sum(start < time for start in used) for time in used) <= stages
    assert step.step_seconds <= m * (stages // 4) + stages
