"""Schedules as text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tptrain.pipeline.actions import COMPUTATIONS, Action, Kind, ScheduleError, with_transfers
from tptrain.pipeline.notation import dumps, loads
from tptrain.pipeline.schedules import gpipe, zb_h1

ACTIONS = st.builds(Action, st.sampled_from(COMPUTATIONS), st.integers(0, 999_999), st.integers(0, 999_999))


@given(st.lists(st.lists(ACTIONS, min_size=1, max_size=20), max_size=8))
def test_round_trip(schedule: list[list[Action]]) -> None:
    text = dumps(schedule)
    assert loads(text) == schedule
    assert len(text.splitlines()) == len(schedule)


def test_a_schedule_as_text() -> None:
    assert dumps(gpipe(2, 1, 2)) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1\n"
    assert dumps(zb_h1(2, 1, 1)) == "0F0 0I0 0W0\n1F0 1I0 1W0\n"


def test_comments_blank_lines_and_spaces_do_not_count() -> None:
    text = "# two ranks\n\n  0F0\t0B0 # rank 0\r\n   # nothing\n1F0 1B0#rank 1"
    assert loads(text) == gpipe(2, 1, 1)
    assert loads("") == loads("# nothing\n\n") == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("0F0 0X1", "line 1, word 2: '0X1' is not a stage, one of F, B, I, W, and a micro-batch, as in 0F0"),
        ("# a\n\n0F0\n0B", "line 4, word 1: '0B' is not a stage"),
        ("0F0 0f1", "line 1, word 2: '0f1' is not a stage"),
        ("0F0,0F1", "line 1, word 1: '0F0,0F1' is not a stage"),
        ("-1F0", "line 1, word 1: '-1F0' is not a stage"),
        ("٣F0", "line 1, word 1: '٣F0' is not a stage"),
        ("0F" + "9" * 5000, "line 1, word 1: '0F99"),
        ("0F0 0SF0", "line 1, word 2: '0SF0' is a transfer, which follows from the computations and is not written"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, fault: str) -> None:
    with pytest.raises(ScheduleError, match="^" + re.escape(fault)) as error:
        loads(text)
    assert len(str(error.value)) < 150


def test_what_has_no_text() -> None:
    with pytest.raises(ScheduleError, match=r"^rank 0, position 0: 0RB0 is no computation$"):
        dumps(with_transfers(gpipe(2, 1, 1)))
    with pytest.raises(ScheduleError, match=r"^rank 1 has no computation$"):
        dumps([[Action(Kind.FORWARD, 0, 0)], []])
