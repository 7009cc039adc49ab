"""What `tptrain plan` works out, as pictures: memory of each rank by component, and of the best layouts what a step is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tptrain.monitor.draw_style import BLUE, GREEN, GREY, INK, ORANGE, VERMILLION

_COLOURS = (BLUE, "#56B4E9", GREEN, "#F0E442", ORANGE, VERMILLION, "#CC79A7", "#8C564B", "#999999", GREY)
"""Those of `draw_style` and the rest of Okabe and Ito's, then greys."""
_ROW, _TOP, _BOTTOM = 0.42, 1.1, 0.7
"""Inches: of a bar, above the first and below the last."""


def memory(ranks: Sequence[Mapping[str, float]], device_bytes: float | None, title: str) -> Figure:
    """A stack a pipeline rank. ranks: bytes by component, each with the same ones. device_bytes: of a device, a line where it is known."""
    scale, unit = _bytes_unit(max(sum(rank.values()) for rank in ranks))
    figure = Figure(figsize=(min(20.0, max(8.0, 3 + 0.35 * len(ranks))), 4.8), layout="constrained")
    axes = figure.subplots()
    places, bottoms = range(len(ranks)), [0.0] * len(ranks)
    for component, colour in zip(_present(ranks), _COLOURS, strict=False):
        heights = [rank[component] / scale for rank in ranks]
        axes.bar(places, heights, 0.8, bottoms, color=colour, label=component)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if device_bytes is not None:
        axes.axhline(device_bytes / scale, color=INK, linestyle="--", label=f"the device's {device_bytes / scale:.4g} {unit}")
    axes.set_xlabel("pipeline rank")
    axes.set_ylabel(f"memory of a rank, {unit}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.grid(axis="y")
    _legend_beside(axes)
    return figure


def layouts(steps: Sequence[tuple[str, Mapping[str, float]]], title: str) -> Figure:
    """A bar a layout, the first on top. steps: its name, and the seconds of a step by what they are spent on."""
    parts = [seconds for _, seconds in steps]
    longest = max(sum(seconds.values()) for seconds in parts)
    scale, unit = (1.0, "seconds") if longest >= 1 else (1e-3, "milliseconds")
    figure = Figure(figsize=(14.0, _TOP + _ROW * len(steps) + _BOTTOM), layout="constrained")
    axes = figure.subplots()
    lefts = [0.0] * len(steps)
    for part, colour in zip(_present(parts), _COLOURS, strict=False):
        widths = [seconds[part] / scale for seconds in parts]
        axes.barh(range(len(steps)), widths, 0.75, lefts, color=colour, label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for row, end in enumerate(lefts):
        axes.text(end, row, f" {end:.4g}", va="center", color=INK, fontsize=10)
    axes.set_yticks(range(len(steps)), [name for name, _ in steps])
    axes.set_ylim(len(steps) - 0.4, -0.6)
    axes.set_xlim(0, 1.08 * longest / scale)
    axes.set_xlabel(f"time of a step, {unit}")
    axes.set_title(title)
    axes.grid(axis="x")
    _legend_beside(axes)
    return figure


def _present(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The names of the parts that are above 0 anywhere."""
    return [name for name in rows[0] if any(row[name] > 0 for row in rows)]


def _legend_beside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _bytes_unit(most: float) -> tuple[float, str]:
    """Bytes in a unit, and its name."""
    return (1e9, "GB") if most >= 1e9 else (1e6, "MB")
