"""The pictures of a plan: what stands in the axes is what was handed in."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from tptrain.monitor.draw_plan import layouts, memory
from tptrain.monitor.draw_timeline import planned
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs, simulate


def test_memory_is_stacked_below_the_device() -> None:
    ranks = [{"parameters": 3e9, "unused": 0.0, "activations": 7e9}, {"parameters": 2e9, "unused": 0.0, "activations": 4e9}]
    (axes,) = memory(ranks, 12e9, "title").axes
    bars = {container.get_label(): [(bar.get_y(), bar.get_height()) for bar in container] for container in axes.containers}
    assert bars == {"parameters": [(0, 3), (0, 2)], "activations": [(3, 7), (2, 4)]}, "in GB, without what is nowhere"
    (line,) = axes.lines
    assert list(line.get_ydata()) == [12, 12]
    assert not memory(ranks, None, "title").axes[0].lines


def test_steps_add_up() -> None:
    steps = [("one", {"compute": 0.2, "bubble": 0.05}), ("two", {"compute": 0.3, "bubble": 0.0})]
    (axes,) = layouts(steps, "title").axes
    bars = {container.get_label(): [(bar.get_x(), bar.get_width()) for bar in container] for container in axes.containers}
    assert [value for pair in bars["compute"] for value in pair] == pytest.approx([0, 200, 0, 300])
    assert [value for pair in bars["bubble"] for value in pair] == pytest.approx([200, 50, 300, 0]), "in milliseconds"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert axes.yaxis_inverted(), "the first on top"


@pytest.mark.parametrize("micro_batches", [4, 400])
def test_a_planned_step_is_drawn_whole(micro_batches: int) -> None:
    """One by one, and many at once: of each rank the same width is covered by forwards."""
    step = simulate(SCHEDULES["1f1b"](2, 1, micro_batches), Costs([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]))
    figure = planned(step, "title")
    (axes,) = figure.axes
    blue = to_hex("#0072B2")
    blocks = [patch.get_width() for patch in axes.patches if to_hex(patch.get_facecolor()) == blue]
    for bars in axes.collections:
        if to_hex(bars.get_facecolor()[0]) == blue:
            blocks += [path.get_extents().width for path in bars.get_paths()]
    assert blocks == pytest.approx([1.0] * 2 * micro_batches)
    assert f"bubble {100 * step.bubble_fraction:.1f} %" in figure.texts[0].get_text()
