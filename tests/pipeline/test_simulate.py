"""The simulator against the closed forms of the papers, and against steps worked out by hand. Costs are whole numbers or fractions,
so that == holds."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from tptrain.pipeline.actions import Action, Kind, Schedule, ScheduleError, with_transfers
from tptrain.pipeline.schedules import SCHEDULES, forward_only
from tptrain.pipeline.simulate import Costs, Simulation, simulate
from tptrain.pipeline.validate import validate

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 7), (3, 2), (4, 4), (4, 8), (5, 13), (8, 3)]  # ranks, micro-batches


def equal_costs(stages: int, forward: int = 3, input_gradient: int = 4, weight_gradient: int = 2, transfer: int = 0) -> Costs:
    costs = [[Fraction(cost)] * stages for cost in (forward, input_gradient, weight_gradient)]
    return Costs(*costs, Fraction(transfer))


def action(text: str) -> Action:
    """`1F0`: the forward of stage 1, micro-batch 0."""
    return Action(Kind(text[1]), int(text[0]), int(text[2]))


def actions(text: str) -> list[Action]:
    return [action(word) for word in text.split()]


def starts(simulation: Simulation) -> list[list[tuple[str, float]]]:
    return [[(str(span.action), span.start) for span in spans] for spans in simulation.timeline]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_of_one_stage_a_rank(name: str, p: int, m: int) -> None:
    """(p - 1) / (m + p - 1), whatever a forward and a backward cost (Huang et al. 2019; Narayanan et al. 2021, section 2.2)."""
    step = simulate(SCHEDULES[name](p, 1, m), equal_costs(p))
    assert step.bubble_fraction == Fraction(p - 1, m + p - 1)
    assert step.step_seconds == (m + p - 1) * (3 + 4 + 2)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_peak_of_live_activations(p: int, m: int) -> None:
    """gpipe keeps every micro-batch; 1f1b at most p - s on stage s."""
    assert simulate(SCHEDULES["gpipe"](p, 1, m), equal_costs(p)).peaks == [m] * p
    assert simulate(SCHEDULES["1f1b"](p, 1, m), equal_costs(p)).peaks == [min(p - stage, m) for stage in range(p)]


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_bubble_of_interleaved_stages(p: int, v: int) -> None:
    """(p - 1) / (v * m + p - 1) for m >= p (Narayanan et al. 2021, section 2.2), in equal groups of p micro-batches or a few more."""
    for m in (p, p + 1, 2 * p, 2 * (p + 1), 5 * p):
        if m % max(1, m // p) == 0:
            step = simulate(SCHEDULES["interleaved"](p, v, m), equal_costs(p * v))
            assert step.bubble_fraction == Fraction(p - 1, v * m + p - 1), m


@pytest.mark.parametrize(("forward", "input_gradient", "weight_gradient"), [(1, 1, 1), (3, 4, 2), (4, 2, 2), (5, 3, 1), (2, 5, 2)])
def test_bubble_of_zb_h1(forward: int, input_gradient: int, weight_gradient: int) -> None:
    """(p - 1)(F + I - W) idle units on each rank (Qi et al. 2023, table 2), where W is at most F and at most I, and m >= p."""
    costs = (forward, input_gradient, weight_gradient)
    for p in range(1, 7):
        for m in (p, p + 1, 2 * p, 3 * p + 2):
            step = simulate(SCHEDULES["zb_h1"](p, 1, m), equal_costs(p, *costs))
            idle = (p - 1) * (forward + input_gradient - weight_gradient)
            assert step.bubble_fraction == Fraction(idle, m * sum(costs) + idle), (p, m)


def test_weight_gradients_fill_the_bubble() -> None:
    """Four ranks, eight micro-batches, F, I and W of one unit: with zb_h1 at most half of 1f1b's bubble for the same memory, with zb_v
    less still. zb_v's stages are half as large, so are their costs and their activations."""
    one = simulate(SCHEDULES["1f1b"](4, 1, 8), equal_costs(4, 2, 2, 2))
    h1 = simulate(SCHEDULES["zb_h1"](4, 1, 8), equal_costs(4, 2, 2, 2))
    v = simulate(SCHEDULES["zb_v"](4, 2, 8), equal_costs(8, 1, 1, 1))
    assert (one.bubble_fraction, h1.bubble_fraction) == (Fraction(3, 11), Fraction(3, 27))
    assert h1.bubble_fraction <= one.bubble_fraction / 2
    assert v.bubble_fraction < h1.bubble_fraction
    assert v.step_seconds < h1.step_seconds < one.step_seconds
    assert max(one.peaks) == max(h1.peaks) == max(v.peaks) / 2 == 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_peaks_are_those_that_the_validator_counts(name: str) -> None:
    """Whatever the costs are: a rank's order decides."""
    for p, m in SIZES:
        v = 2 if name in ("interleaved", "zb_v") else 1
        if name == "interleaved" and m % max(1, m // p):
            continue
        schedule = SCHEDULES[name](p, v, m)
        costs = Costs(*[[1 + (7 * stage + shift) % 5 for stage in range(p * v)] for shift in range(3)], transfer=2)
        step = simulate(schedule, costs)
        assert step.peaks == validate(with_transfers(schedule), m), (p, m)
        assert all(changes[-1][1] == 0 for changes in step.live), "nothing stays"


def test_no_rank_is_ahead_of_its_input() -> None:
    """Each computation starts at the latest of what it needs: its rank free, its input there. Checked span by span."""
    costs = Costs([2, 5, 3], [4, 1, 7], [1, 6, 2], transfer=2)
    for name in ("gpipe", "1f1b"):
        timeline = simulate(SCHEDULES[name](3, 1, 4), costs).timeline
        end = {span.action: span.end for spans in timeline for span in spans}
        for rank, spans in enumerate(timeline):
            free = 0.0
            for (kind, stage, m), start, finish in spans:
                source = Action(kind, stage + (-1 if kind is Kind.FORWARD else 1), m)
                assert start == max(free, end[source] + 2 if source in end else 0)
                forward = kind is Kind.FORWARD
                assert finish - start == (costs.forward[rank] if forward else costs.input_gradient[rank] + costs.weight_gradient[rank])
                free = finish


def test_a_step_by_hand() -> None:
    """Two stages, the second slower; a transfer takes 2.

    rank 0: F0 0-3, F1 3-6; the gradient of B0 is made by 14 and there at 16: B0 16-19; that of B1 at 23 and 25: B1 25-28
    rank 1: F0, made by 3, is there at 5: 5-10, B0 10-14, F1 14-19, B1 19-23
    """
    step = simulate(SCHEDULES["1f1b"](2, 1, 2), Costs([3, 5], [2, 3], [1, 1], transfer=2))
    assert starts(step) == [
        [("0F0", 0), ("0F1", 3), ("0B0", 16), ("0B1", 25)],
        [("1F0", 5), ("1B0", 10), ("1F1", 14), ("1B1", 19)],
    ]
    assert step.step_seconds == 28
    assert step.bubble_fraction == pytest.approx(1 - (2 * 6 + 2 * 9) / (2 * 28))
    assert step.live == [[(0, 1), (3, 2), (19, 1), (28, 0)], [(5, 1), (14, 0), (14, 1), (23, 0)]]
    assert step.peaks == [2, 1]


def test_a_split_backward_by_hand() -> None:
    """The stage before waits for the input gradient alone; the activations stay until the weight gradient."""
    schedule = [actions("0F0 0F1 0I0 0W0 0I1 0W1"), actions("1F0 1I0 1F1 1I1 1W0 1W1")]
    step = simulate(schedule, Costs([2, 2], [3, 3], [4, 4]))
    assert starts(step) == [
        [("0F0", 0), ("0F1", 2), ("0I0", 7), ("0W0", 10), ("0I1", 14), ("0W1", 17)],
        [("1F0", 2), ("1I0", 4), ("1F1", 7), ("1I1", 9), ("1W0", 12), ("1W1", 16)],
    ]
    assert step.step_seconds == 21
    assert step.peaks == [2, 2]
    assert step.live[1] == [(2, 1), (7, 2), (16, 1), (20, 0)]


def test_nothing_travels_between_stages_of_one_rank() -> None:
    """A V of four stages on two ranks: 1 and 2 are neighbours on rank 1, so that of three hops two take time, both ways."""
    schedule = [actions("0F0 3F0 3B0 0B0"), actions("1F0 2F0 2B0 1B0")]
    step = simulate(schedule, equal_costs(4, forward=1, input_gradient=1, weight_gradient=1, transfer=10))
    assert starts(step) == [[("0F0", 0), ("3F0", 23), ("3B0", 24), ("0B0", 50)], [("1F0", 11), ("2F0", 12), ("2B0", 36), ("1B0", 38)]]


def test_transfers_that_the_schedule_names_change_nothing() -> None:
    schedule, costs = SCHEDULES["1f1b"](3, 1, 5), equal_costs(3, transfer=1)
    assert simulate(with_transfers(schedule), costs) == simulate(schedule, costs)


def test_forward_only() -> None:
    step = simulate(forward_only([0, 1, 2], 4), equal_costs(3))
    assert step.step_seconds == (4 + 3 - 1) * 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (["0F0 0B0", "1B0 1F0"], "rank 0, position 1: 0B0 waits for ever"),
        (["0B0 0F0"], "rank 0, position 0: 0B0 waits for ever"),
        (["0F0 0F1 0B1 0B0", "1F0 1F1 1B0"], "rank 0, position 2: 0B1 waits for ever"),
        (["0F0 0W0 0I0"], "rank 0, position 1: 0W0 waits for ever"),
        (["0F0 1F0", "1F1"], "1F1 is of a stage that rank 0 holds"),
        (["1F0"], "stage 0 has no forward"),
    ],
)
def test_what_cannot_run(schedule: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        simulate([actions(rank) for rank in schedule], equal_costs(2))


def test_sixteen_ranks_with_four_stages_take_well_below_a_second() -> None:
    p, v, m = 16, 4, 256
    schedule: Schedule = SCHEDULES["interleaved"](p, v, m)
    begin = time.process_time()
    step = simulate(schedule, Costs([1] * p * v, [1] * p * v, [1] * p * v))
    assert step.step_seconds == 3 * (v * m + p - 1)
    assert time.process_time() - begin < 1
