"""Timelines as drawn: what stands in the axes is what the spans say."""

from __future__ import annotations

import math

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tptrain.monitor.draw_timeline import COLOURS, costs_of, simulation_of, timelines
from tptrain.pipeline.actions import Action, Kind, ScheduleError
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.timeline import Span, Timeline


def span(name: str, start: float, end: float) -> Span:
    """`span("1F0", 0.5, 0.75)`."""
    return Span(Action(Kind(name[1]), int(name[0]), int(name[2:])), start, end)


MEASURED: Timeline = [
    [span("0F0", 7.010, 7.030), span("0F1", 7.030, 7.055), span("0B0", 7.100, 7.150), span("0B1", 7.170, 7.210)],
    [span("1F0", 7.035, 7.050), span("1I0", 7.055, 7.085), span("1F1", 7.090, 7.105), span("1W0", 7.105, 7.106), span("1B1", 7.110, 7.160)],
]
"""Two ranks; the first computation starts 7.010 seconds after the ranks' zero, the last ends 0.2 seconds later."""


def panels(figure: Figure) -> list[Axes]:
    return list(figure.axes)


def rectangles(axes: Axes) -> dict[str, Rectangle]:
    found = {str(patch.get_gid()): patch for patch in axes.patches}
    assert len(found) == len(axes.patches)
    return found  # type: ignore[return-value]


def test_the_rectangles_are_the_spans() -> None:
    simulation = simulation_of(MEASURED)
    above, below = panels(timelines(MEASURED, simulation, "title"))
    for axes, timeline, zero in ((above, MEASURED, 7.010), (below, simulation.timeline, 0.0)):
        drawn = rectangles(axes)
        assert drawn.keys() == {str(each.action) for spans in timeline for each in spans}
        for rank, spans in enumerate(timeline):
            for each in spans:
                block = drawn[str(each.action)]
                assert block.get_x() == pytest.approx(1000 * (each.start - zero)), "milliseconds"
                assert block.get_width() == pytest.approx(1000 * (each.end - each.start))
                assert block.get_y() + block.get_height() / 2 == pytest.approx(rank)
                assert 0.5 < block.get_height() < 1, "rows do not touch"
    assert above.get_xlim() == below.get_xlim() == pytest.approx((0, 200)), "the same axis of time, as long as the longer one"
    assert above.yaxis_inverted(), "the first rank on top"


def test_the_background_is_the_whole_step() -> None:
    """So that what is seen of it is the bubble."""
    (axes,) = panels(timelines(MEASURED, None, "title"))
    bands = [path.get_extents().get_points().ravel().tolist() for bars in axes.collections for path in bars.get_paths()]
    assert [(left, right) for left, _, right, _ in bands] == [pytest.approx((0, 200))] * 2
    assert [(low + high) / 2 for _, low, _, high in bands] == pytest.approx([0, 1])


def test_the_title_has_both_bubbles() -> None:
    busy = 0.020 + 0.025 + 0.050 + 0.040 + 0.015 + 0.030 + 0.015 + 0.001 + 0.050
    simulation = simulation_of(MEASURED)
    figure = timelines(MEASURED, simulation, "1f1b, p = 2, m = 2, step 5")
    assert figure.texts[0].get_text().startswith("1f1b, p = 2, m = 2, step 5")
    assert (
        f"bubble {100 * (1 - busy / 0.4):.1f} % measured, {100 * simulation.bubble_fraction:.1f} % simulated" in figure.texts[0].get_text()
    )
    assert next(axes.get_title(loc="left") or axes.get_title() for axes in panels(figure)) == "measured, 200 ms"
    alone = timelines(MEASURED, None, "x")
    assert "simulated" not in alone.texts[0].get_text()


def test_a_kind_has_a_colour_and_a_later_stage_a_paler_one() -> None:
    two_stages = [[span("0F0", 0, 1), span("1F0", 1, 2), span("1B0", 2, 3), span("0B0", 3, 4)]]
    figure = timelines(two_stages, None, "x")
    drawn = {name: block.get_facecolor()[:3] for name, block in rectangles(panels(figure)[0]).items()}
    assert drawn["0F0"] == pytest.approx(to_rgb(COLOURS[Kind.FORWARD]))
    assert drawn["0B0"] == pytest.approx(to_rgb(COLOURS[Kind.BACKWARD]))
    for paler, full in (("1F0", "0F0"), ("1B0", "0B0")):
        assert all(1 > light > dark or light == dark == 1 for light, dark in zip(drawn[paler], drawn[full], strict=True))
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["forward (F)", "backward (B)", "bubble", "paler: a rank's later stages"]
    assert len({*COLOURS.values()}) == 4


def test_a_block_has_its_micro_batch_s_number_where_it_fits() -> None:
    (axes,) = panels(timelines(MEASURED, None, "x"))
    numbers = {(text.get_position()[1], round(text.get_position()[0], 3)): text.get_text() for text in axes.texts}
    middles = {(rank, round(1000 * ((s.start + s.end) / 2 - 7.010), 3)): s for rank, spans in enumerate(MEASURED) for s in spans}
    missing = {str(middles[place].action) for place in middles.keys() - numbers.keys()}
    assert missing == {"1W0"}, "a block of 1 ms in 200"
    assert all(text == str(middles[place].action.micro_batch) for place, text in numbers.items())


def test_numbers_stay_within_their_blocks() -> None:
    """Also many of them, of two digits, as the renderer measures them."""
    figure = timelines(even("1f1b", 4, 40, 1e-3), None, "x")
    figure.canvas.draw()
    (axes,) = panels(figure)
    blocks = sorted((block.get_window_extent() for block in axes.patches), key=lambda box: box.width)
    assert axes.texts
    for text in axes.texts:
        box = text.get_window_extent()
        assert any(block.x0 <= box.x0 and box.x1 <= block.x1 and block.y0 <= box.y0 and box.y1 <= block.y1 for block in blocks)


@pytest.mark.parametrize(("second", "words", "last"), [(1e-4, "microseconds", 400), (1e-2, "milliseconds", 40), (1.0, "seconds", 4)])
def test_the_axis_has_the_unit_that_suits(second: float, words: str, last: float) -> None:
    timeline = [[span(f"0F{n}", n * second, (n + 1) * second) for n in range(4)]]
    (axes,) = panels(timelines(timeline, None, "x"))
    assert axes.get_xlabel() == f"time, {words}"
    assert axes.get_xlim()[1] == pytest.approx(last)


# ---- the simulation ---------------------------------------------------------------------------------------


def even(schedule: str, ranks: int, micro_batches: int, forward: float) -> Timeline:
    """A timeline whose forwards take equally long and backwards twice as long, with a pause as long as three forwards after each."""
    timeline = []
    for rank, actions in enumerate(SCHEDULES[schedule](ranks, 1, micro_batches)):
        now, spans = 100.0 + rank * forward, []
        for action in actions:
            end = now + forward * (1 if action.kind is Kind.FORWARD else 2)
            spans.append(Span(action, now, end))
            now = end + 3 * forward
        timeline.append(spans)
    return timeline


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 4), (4, 8)])
def test_the_simulated_bubble_is_the_formula_s(schedule: str, ranks: int, micro_batches: int) -> None:
    """(p - 1) / (m + p - 1) of equal computations, whatever the ranks waited for in between."""
    simulation = simulation_of(even(schedule, ranks, micro_batches, 0.25))
    assert simulation.bubble_fraction == pytest.approx((ranks - 1) / (micro_batches + ranks - 1), abs=1e-12)
    assert simulation.step_seconds == pytest.approx(0.75 * (micro_batches + ranks - 1))


def test_costs_are_means_by_stage_and_kind() -> None:
    costs = costs_of(MEASURED)
    assert costs.forward == pytest.approx([0.0225, 0.015])
    assert costs.input_gradient == pytest.approx([0.0225, (0.030 + 0.025) / 2]), "half of a backward in one piece"
    assert costs.weight_gradient == pytest.approx([0.0225, (0.001 + 0.025) / 2])
    assert all(map(math.isfinite, costs.forward))


def test_an_order_that_cannot_be_is_refused() -> None:
    with pytest.raises(ScheduleError):
        simulation_of([[span("0B0", 0, 1), span("0F0", 1, 2)]])
