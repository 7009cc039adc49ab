from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR

from tptrain.config import LrScheduleConfig
from tptrain.optim.lr_schedules import learning_rate

PEAK = 3e-4


def rate(step: int, warmup: int = 10, max_steps: int = 100, low: float = 0.1, name: str = "cosine") -> float:
    return learning_rate(step, LrScheduleConfig(name=name, warmup_steps=warmup, min_lr_ratio=low), PEAK, max_steps)


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_warmup_is_a_line_that_starts_above_zero(name: str) -> None:
    assert [rate(step, warmup=4, name=name) for step in (1, 2, 3, 4)] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK])


def test_corners_of_the_cosine() -> None:
    assert rate(10) == pytest.approx(PEAK)
    assert rate(55) == pytest.approx(PEAK * (1 + 0.1) / 2), "half-way down is half-way between peak and floor"
    assert rate(10 + 30) == pytest.approx(PEAK * (0.1 + 0.9 * 0.75)), "a third of the way: cos(60 degrees) = 1/2"
    assert rate(100) == pytest.approx(PEAK * 0.1)
    assert rate(101) == rate(10_000) == pytest.approx(PEAK * 0.1), "a run that goes on stays at the floor"
    assert rate(100, low=0.0) == pytest.approx(0, abs=1e-12)
    assert rate(77, low=1.0) == pytest.approx(PEAK)


def test_no_warmup() -> None:
    assert rate(1, warmup=0, max_steps=2) == pytest.approx(PEAK * (0.1 + 0.9 / 2))
    assert rate(2, warmup=0, max_steps=2) == pytest.approx(PEAK * 0.1)
    assert rate(1, warmup=0, name="constant") == PEAK


def test_warmup_as_long_as_the_run_or_longer() -> None:
    assert rate(5, warmup=5, max_steps=5) == pytest.approx(PEAK)
    assert rate(5, warmup=20, max_steps=5) == pytest.approx(PEAK / 4)
    assert rate(6, warmup=5, max_steps=5) == pytest.approx(PEAK * 0.1)


def test_constant_stays() -> None:
    assert {rate(step, name="constant") for step in (10, 11, 50, 100, 1000)} == {PEAK}


@pytest.mark.parametrize(("warmup", "max_steps", "low"), [(0, 30, 0.1), (7, 30, 0.0), (3, 11, 0.25)])
def test_the_cosine_is_torch_s(warmup: int, max_steps: int, low: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = CosineAnnealingLR(optimizer, T_max=max_steps - warmup, eta_min=low * PEAK)
    for step in range(warmup + 1, max_steps + 1):
        optimizer.step()
        scheduler.step()
        assert rate(step, warmup, max_steps, low) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), step


@given(warmup=st.integers(0, 50), max_steps=st.integers(1, 200), low=st.floats(0, 1), name=st.sampled_from(["cosine", "constant"]))
def test_up_then_down_and_never_outside(warmup: int, max_steps: int, low: float, name: str) -> None:
    rates = [rate(step, warmup, max_steps, low, name) for step in range(1, max_steps + 5)]
    assert all(0 <= value <= PEAK * (1 + 1e-12) for value in rates)
    assert all(before <= after for before, after in pairwise(rates[:warmup]))
    assert all(before >= after - 1e-15 for before, after in pairwise(rates[max(0, warmup - 1) :]))
