"""docs/pipeline.md says what the schedules do: its table against the simulator, its pictures and its example against the schedules."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tptrain.pipeline.actions import with_transfers
from tptrain.pipeline.notation import loads
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs, Simulation, simulate
from tptrain.pipeline.validate import check_computations, validate

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "pipeline.md").read_text()
P, M = 4, 8
ROWS = {
    name: (int(v), bubble, float(percent), peak.partition(", groups")[0], float(most))
    for name, v, bubble, percent, peak, most in re.findall(
        r"^\| `(\w+)` \| (\d) \| ([^|]+) \| ([\d.]+) % \| ([^|]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE
    )
}


def step_of(name: str, p: int, m: int) -> Simulation:
    """A step of equal stages: F, I and W each take a rank a unit of time for all that it holds."""
    v = ROWS[name][0]
    costs = [1 / v] * (p * v)
    return simulate(SCHEDULES[name](p, v, m), Costs(costs, costs, costs))


def value(formula: str, **numbers: int) -> float:
    """A formula of the table, where what stands side by side is multiplied: `(p-1) / (3m+p-1)`."""
    text = ""
    for token, following in pairwise([*re.findall(r"min|[a-z]|\d+|[^\s]", formula), ""]):
        is_product = re.match(r"[a-z\d)]", token) and token != "min" and re.match(r"[a-z\d(]", following)
        text += f"{token}*" if is_product else token
    return float(eval(text, {"min": min, **numbers}))


def test_every_schedule_is_there() -> None:
    assert ROWS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_table(name: str) -> None:
    _, _, percent, _, most = ROWS[name]
    step = step_of(name, P, M)
    assert 100 * step.bubble_fraction == pytest.approx(percent, abs=0.05)
    assert max(step.peaks) / ROWS[name][0] == most


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_formulas_of_the_table(name: str) -> None:
    """For m >= p, and up to the 11 ranks that zb_v's holds for."""
    v, bubble, _, peak, _ = ROWS[name]
    for p in range(1, 12):
        for m in (p, p + 1, p + 3, 2 * p, 3 * p + 1):
            step, numbers = step_of(name, p, m), {"p": p, "m": m, "v": v, "g": -(-m // (m // p))}
            assert step.bubble_fraction == pytest.approx(value(bubble, **numbers), abs=1e-9), (p, m)
            assert max(step.peaks) / v == pytest.approx(value(peak, **numbers)), (p, m)


def test_in_a_v_every_rank_has_the_same_peak() -> None:
    assert "every rank the same peak" in " ".join(PAGE.split())
    for p in range(1, 12):
        assert step_of("zb_v", p, 2 * p).peaks == [2 * p] * p, p


def test_the_example_of_a_file_runs() -> None:
    keys, text = re.findall(r"^    # (parallel\..*)\n((?:    \d.*\n)+)", PAGE, re.MULTILINE)[0]
    asked = dict(re.findall(r"parallel\.(\w+)=(\d+)", keys))
    schedule = loads(text)
    assert len(schedule) == int(asked["pp"])
    check_computations(schedule, int(asked["micro_batches"]))
    validate(with_transfers(schedule), int(asked["micro_batches"]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_picture_has_each_computation(name: str) -> None:
    """Each block has its computation as its id."""
    drawn = re.findall(r'<g id="(\d+[FBIW]\d+)">', (DOCS / f"schedules/{name}.svg").read_text())
    schedule = SCHEDULES[name](P, ROWS[name][0], M)
    assert sorted(drawn) == sorted(str(action) for actions in schedule for action in actions)
