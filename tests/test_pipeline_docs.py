"""docs/pipeline.md says what the schedules do: its table against the simulator, its pictures against the schedules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs, simulate

DOCS = Path(__file__).parents[1] / "docs"
P, M = 4, 8
ROWS = {
    name: (int(v), float(bubble), float(peak))
    for name, v, bubble, peak in re.findall(
        r"^\| `(\w+)` \| (\d) \|[^|]*\| ([\d.]+) % \|[^|]*\| ([\d.]+) \|$", (DOCS / "pipeline.md").read_text(), re.MULTILINE
    )
}


def test_every_schedule_is_there() -> None:
    assert ROWS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_table(name: str) -> None:
    v, bubble, peak = ROWS[name]
    costs = [1 / v] * (P * v)
    step = simulate(SCHEDULES[name](P, v, M), Costs(costs, costs, costs))
    assert 100 * step.bubble_fraction == pytest.approx(bubble, abs=0.05)
    assert max(step.peaks) / v == peak


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_picture_has_each_computation(name: str) -> None:
    """Each block has its computation as its id."""
    drawn = re.findall(r'<g id="(\d+[FBIW]\d+)">', (DOCS / f"schedules/{name}.svg").read_text())
    schedule = SCHEDULES[name](P, ROWS[name][0], M)
    assert sorted(drawn) == sorted(str(action) for actions in schedule for action in actions)
