"""Curves as drawn: what stands in the axes is what metrics.jsonl says."""

from __future__ import annotations

import math

import pytest

from tptrain.monitor import draw_records

GIB = 2**30
RECORDS = [
    {"step": 10, "tokens": 1000, "loss": 5.5, "tokens_per_second": None, "bubble_fraction": 0.25, "peak_memory_bytes": GIB},
    {"step": 20, "tokens": 2000, "loss": None, "tokens_per_second": 1200.0, "bubble_fraction": None, "peak_memory_bytes": 2 * GIB},
    {"step": 20, "val_loss": 4.25, "val_perplexity": 70.1},
    {"step": 30, "tokens": 4000, "loss": 4.0, "tokens_per_second": 1300.0, "bubble_fraction": 0.2, "peak_memory_bytes": 3 * GIB},
]


def curves(axes) -> list[tuple[list[float], list[float]]]:
    return [([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]) for line in axes.lines]


def same(curve, steps: list[int], values: list[float]) -> None:
    assert curve[0] == steps
    assert curve[1] == pytest.approx(values, nan_ok=True)


def test_losses_over_steps_and_tokens() -> None:
    figure = draw_records.loss(RECORDS)
    (axes,) = figure.axes
    training, validation = curves(axes)
    same(training, [10, 20, 30], [5.5, math.nan, 4.0])
    same(validation, [20], [4.25])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training, last 4.000", "validation, last 4.250"]
    (top,) = axes.child_axes
    figure.canvas.draw()
    labels = {tick: label.get_text() for tick, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True)}
    assert labels[10] == "1.00k"
    assert labels[20] == "2.00k"
    assert labels[25] == "3.00k", "half-way from 2000 to 4000"
    assert labels[30] == "4.00k"


def test_a_run_without_evaluations_has_one_line() -> None:
    (axes,) = draw_records.loss([record for record in RECORDS if "val_loss" not in record]).axes
    assert len(curves(axes)) == 1


def test_throughput_and_the_bubble_below_it() -> None:
    above, below = draw_records.throughput(RECORDS, with_bubble=True).axes
    same(curves(above)[0], [10, 20, 30], [math.nan, 1200, 1300])
    same(curves(below)[0], [10, 20, 30], [0.25, math.nan, 0.2])
    for axes in (above, below):
        low, high = axes.get_ylim()
        assert low == 0, "a change looks as large as it is"
        assert high > max(y for _, ys in curves(axes) for y in ys if math.isfinite(y))
    assert len(draw_records.throughput(RECORDS, with_bubble=False).axes) == 1
    unknown = [{**record, "bubble_fraction": None} for record in RECORDS]
    assert len(draw_records.throughput(unknown, with_bubble=True).axes) == 1


@pytest.mark.parametrize(("unit", "size"), [("GiB", GIB), ("MiB", GIB // 1024)])
def test_memory_has_the_unit_that_suits(unit: str, size: int) -> None:
    (axes,) = draw_records.memory([{**record, "peak_memory_bytes": size * step} for step, record in enumerate(RECORDS, 1)]).axes
    same(curves(axes)[0], [10, 20, 20, 30], [1, 2, 3, 4])
    assert axes.get_ylabel().endswith(f", {unit}")
    assert axes.get_ylim()[0] == 0
