"""The bound of a step, against the simulation of every schedule."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.pipeline.actions import placement
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs, simulate
from tptrain.plan.bound import least_seconds

WHOLE = {"gpipe": (1, 3), "1f1b": (1, 1), "interleaved": (2, 3)}
"""Schedules whose backwards are one action, with the stages a rank that they may have."""
SPLIT = {"zb_h1": (1, 1), "zb_v": (2, 2)}
seconds = st.integers(1, 40)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_step_beats_it(data: st.DataObject) -> None:
    """Also with stages that are far from equal."""
    name = data.draw(st.sampled_from(sorted(WHOLE | SPLIT)))
    p, v, m = data.draw(st.integers(1, 5)), data.draw(st.integers(*(WHOLE | SPLIT)[name])), data.draw(st.integers(1, 12))
    forward, inputs, weights = (data.draw(st.lists(seconds, min_size=p * v, max_size=p * v)) for _ in range(3))
    costs = Costs(forward, inputs, weights, data.draw(st.integers(0, 10)))
    schedule = SCHEDULES[name](p, v, m)
    assert least_seconds(placement(schedule), m, costs, name in SPLIT) <= simulate(schedule, costs).step_seconds + 1e-9


@pytest.mark.parametrize(("p", "v", "m"), [(4, 1, 4), (4, 1, 11), (8, 1, 8), (4, 2, 8), (4, 3, 12), (2, 5, 4)])
def test_equal_stages_take_just_that(p: int, v: int, m: int) -> None:
    """m (F + B) + (p - 1) (F + B) / v, F and B of a whole rank."""
    costs = Costs([3.0] * p * v, [4.0] * p * v, [2.0] * p * v)
    schedule = SCHEDULES["1f1b" if v == 1 else "interleaved"](p, v, m)
    formula = float(m * 9 * v + Fraction(p - 1, v) * 9 * v)
    assert least_seconds(placement(schedule), m, costs, splits=False) == pytest.approx(formula)
    assert simulate(schedule, costs).step_seconds == pytest.approx(formula)
