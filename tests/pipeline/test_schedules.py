"""Schedules against the papers: order, peak of live activations, time; for every small number of stages and micro-batches."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tptrain.pipeline.actions import Action, Kind, Schedule, with_transfers
from tptrain.pipeline.schedules import SCHEDULES, forward_only, gpipe, one_forward_one_backward
from tptrain.pipeline.validate import validate

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 13)]  # fewer micro-batches than stages, as many, and more


def peak(name: str, p: int, m: int, s: int) -> int:
    """Micro-batches that stage s holds at most (Narayanan et al. 2021, section 2.2)."""
    return m if name == "gpipe" else min(p - s, m)


def check(name: str, p: int, m: int) -> None:
    computations = SCHEDULES[name](p, 1, m)
    expected = Counter(Action(kind, s, i) for kind in (Kind.FORWARD, Kind.BACKWARD) for s in range(p) for i in range(m))
    assert Counter(action for rank in computations for action in rank) == expected, "each computation once, and nothing else"
    assert all(action.stage == rank for rank, actions in enumerate(computations) for action in actions)
    schedule = with_transfers(computations)
    assert validate(schedule, m) == [peak(name, p, m, s) for s in range(p)]
    assert [held_most(actions) for actions in computations] == [peak(name, p, m, s) for s in range(p)], "counted by hand"


def held_most(actions: list[Action]) -> int:
    live = most = 0
    for action in actions:
        live += 1 if action.kind is Kind.FORWARD else -1
        most = max(most, live)
    assert live == 0
    return most


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_small_size(name: str) -> None:
    for p, m in SIZES:
        check(name, p, m)


@given(name=st.sampled_from(sorted(SCHEDULES)), p=st.integers(1, 24), m=st.integers(1, 60))
def test_larger_sizes(name: str, p: int, m: int) -> None:
    check(name, p, m)


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


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_is_the_papers_formula(name: str) -> None:
    """(m + p - 1) forwards and backwards long: a bubble of p - 1 of each, with a backward twice as long as a forward."""
    for p, m in SIZES:
        assert finish_time(SCHEDULES[name](p, 1, m), forward=1, backward=2) == (m + p - 1) * 3, (p, m)


def finish_time(schedule: Schedule, forward: int, backward: int) -> int:
    """When the last rank is done if communication takes no time and each rank works in its order."""
    done: dict[Action, int] = {}
    clock, position = [0] * len(schedule), [0] * len(schedule)
    while any(position[rank] < len(actions) for rank, actions in enumerate(schedule)):
        moved = False
        for rank, actions in enumerate(schedule):
            while position[rank] < len(actions):
                kind, s, m = action = actions[position[rank]]
                if kind is Kind.FORWARD:
                    needs = [Action(Kind.FORWARD, s - 1, m)] * (s > 0)
                else:
                    needs = [Action(Kind.FORWARD, s, m)] + [Action(Kind.BACKWARD, s + 1, m)] * (s + 1 < len(schedule))
                if not all(need in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needs)]) + (forward if kind is Kind.FORWARD else backward)
                done[action] = clock[rank]
                position[rank] += 1
                moved = True
        assert moved, "no rank can go on"
    return max(clock)


def test_transfers_surround_their_computations() -> None:
    """Sent as soon as made; received one computation ahead, so that the transfer runs beside it. 1f1b, two stages, two micro-batches."""
    first, second = with_transfers(one_forward_one_backward(2, 1, 2))
    assert words(first) == "F0 SF0 RB0 F1 SF1 RB1 B0 B1"
    assert words(second) == "RF0 F0 RF1 B0 SB0 F1 B1 SB1"
    assert [words(actions) for actions in with_transfers(gpipe(1, 1, 2))] == ["F0 F1 B0 B1"], "one stage talks to nobody"
    assert str(Action(Kind.SEND_GRADIENT, 3, 11)) == "3SB11"


@pytest.mark.parametrize("name", [*SCHEDULES, "forward_only"])
def test_each_transfer_has_its_other_half(name: str) -> None:
    for p, m in SIZES:
        training = name != "forward_only"
        schedule = with_transfers(SCHEDULES[name](p, 1, m) if training else forward_only(range(p), m))
        counted = Counter(action for actions in schedule for action in actions)
        for i in range(m):
            for s in range(p - 1):
                assert counted[Action(Kind.SEND_ACTIVATION, s, i)] == counted[Action(Kind.RECEIVE_ACTIVATION, s + 1, i)] == 1
                assert counted[Action(Kind.SEND_GRADIENT, s + 1, i)] == counted[Action(Kind.RECEIVE_GRADIENT, s, i)] == training
        assert sum(counted.values()) == m * (p + 2 * (p - 1)) * (2 if training else 1)
        if not training:
            validate(schedule, m, backward=False)
