"""A timeline as a picture: each pipeline rank a row, each computation a block, what is left of the row the bubble.

The measured step stands above a simulated one on the same axis of time. The simulation runs the same computations in the same order,
each for the mean time that its stage and kind took: where the measured bubble is the larger one, ranks waited for more than the
schedule asks for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from tptrain.monitor.draw_style import BLUE, GREEN, GREY, INK, ORANGE, VERMILLION
from tptrain.pipeline.actions import Kind
from tptrain.pipeline.simulate import Costs, Simulation, simulate
from tptrain.pipeline.timeline import Timeline, bubble_fraction, duration

COLOURS = {Kind.FORWARD: BLUE, Kind.BACKWARD: VERMILLION, Kind.INPUT_GRADIENT: ORANGE, Kind.WEIGHT_GRADIENT: GREEN}
_NAMES = {
    Kind.FORWARD: "forward (F)",
    Kind.BACKWARD: "backward (B)",
    Kind.INPUT_GRADIENT: "input gradient (I)",
    Kind.WEIGHT_GRADIENT: "weight gradient (W)",
}

_LEFT, _RIGHT, _TOP, _BOTTOM, _TITLE = 0.8, 0.25, 0.8, 0.65, 0.45
"""Inches: of the margins, and of the line above each timeline."""
_NARROWEST, _WIDEST, _WIDTH_OF_ONE = 13.0, 26.0, 0.2
"""Inches of the figure, and what it grows by with each computation of a rank."""
_BLOCK = 0.86
"""Height of a block in its row."""
_BLOCKS = 1500
"""Spans that are drawn one by one."""
_NUMBER_SIZES = (10.0, 8.5, 7.0)
"""Points that a micro-batch's number may have, the largest that most blocks have room for."""
_LETTER = 0.64
"""Width of a digit over the size of its font."""


def timelines(measured: Timeline, simulated: Simulation | None, title: str) -> Figure:
    """The picture. measured: of the ranks of one pipeline. simulated: the same on paper, if it is known. title: without the bubble."""
    shown = {f"measured, {_time(duration(measured))}": measured}
    bubbles = f"{100 * bubble_fraction(measured):.1f} % measured"
    if simulated is not None:
        shown[f"simulated with the mean duration of each stage's computations, {_time(simulated.step_seconds)}"] = simulated.timeline
        bubbles += f", {100 * simulated.bubble_fraction:.1f} % simulated"
    return _figure(shown, f"{title}:  bubble {bubbles}")


def planned(simulation: Simulation, title: str) -> Figure:
    """The picture of a step that has not run. title: without the bubble."""
    heading = f"simulated, {_time(simulation.step_seconds)}"
    return _figure({heading: simulation.timeline}, f"{title}:  bubble {100 * simulation.bubble_fraction:.1f} %")


def _figure(shown: Mapping[str, Timeline], title: str) -> Figure:
    """Timelines by their headings, one above the other."""
    first = next(iter(shown.values()))
    ranks = len(first)
    row = min(0.5, max(0.2, 6 / ranks))
    height = _TOP + len(shown) * (_TITLE + ranks * row) + _BOTTOM
    whole = min(_WIDEST, max(_NARROWEST, _WIDTH_OF_ONE * max(map(len, first))))
    figure = Figure(figsize=(whole, height))
    top, width = height - _TOP, whole - _LEFT - _RIGHT
    longest = max(duration(timeline) for timeline in shown.values())
    scale, unit = _unit(longest)
    for heading, timeline in shown.items():
        top -= _TITLE + ranks * row
        axes = figure.add_axes((_LEFT / whole, top / height, width / whole, ranks * row / height))
        draw(axes, timeline, scale, width / (longest * scale), row)
        axes.set_xlim(0, longest * scale)
        axes.set_title(heading)
        axes.tick_params(labelbottom=False)
    axes.tick_params(labelbottom=True)
    axes.set_xlabel(f"time, {unit}")
    figure.text(_LEFT / whole, 1 - 0.2 / height, title, va="top", fontsize=14, fontweight="bold")
    _legend(figure, first, (_LEFT / whole, 1 - 0.52 / height))
    return figure


def draw(axes: Axes, timeline: Timeline, scale: float, inches: float, row: float) -> None:
    """Draw a timeline, its first computation at 0: a Rectangle for each span, over a band a rank as long as the whole step.

    Of more than `_BLOCKS` spans those of one rank and colour are one shape, without numbers: that is quick, and there is no room.
    scale: units of the axis in a second. inches: of the page, in a unit of the axis. row: height of a row in inches.
    """
    zero = min(span.start for spans in timeline for span in spans)
    axes.set_ylim(len(timeline) - 0.5, -0.5)
    axes.set_yticks(range(len(timeline)), [f"pp {rank}" for rank in range(len(timeline))])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if sum(map(len, timeline)) > _BLOCKS:
        _draw_many(axes, timeline, zero, scale)
        return
    size = _number_size([(span.end - span.start) * scale * inches / len(str(span.action.micro_batch)) for s in timeline for span in s], row)
    for rank, spans in enumerate(timeline):
        axes.broken_barh([(0, duration(timeline) * scale)], (rank - _BLOCK / 2, _BLOCK), facecolor=GREY, linewidth=0)
        stages = sorted({span.action.stage for span in spans})
        for span in spans:
            action, left, width = span.action, (span.start - zero) * scale, (span.end - span.start) * scale
            colour = _shade(COLOURS[action.kind], stages.index(action.stage), len(stages))
            line = 0.5 if width * inches > 0.05 else 0.0  # a line around a thin block would hide it
            block = Rectangle((left, rank - _BLOCK / 2), width, _BLOCK, facecolor=colour, edgecolor="white", linewidth=line)
            block.set_gid(str(action))
            axes.add_patch(block)
            number = str(action.micro_batch)
            if width * inches * 72 > size * _LETTER * (len(number) + 0.3) and row * 72 * _BLOCK > size:
                ink = "white" if _luminance(colour) < 0.36 else INK
                axes.text(left + width / 2, rank, number, ha="center", va="center_baseline", fontsize=size, color=ink)


def _draw_many(axes: Axes, timeline: Timeline, zero: float, scale: float) -> None:
    """A band and one shape a colour for each rank."""
    whole = duration(timeline) * scale
    for rank, spans in enumerate(timeline):
        row = (rank - _BLOCK / 2, _BLOCK)
        axes.broken_barh([(0, whole)], row, facecolor=GREY, linewidth=0)
        stages = sorted({span.action.stage for span in spans})
        places: dict[tuple[Kind, int], list[tuple[float, float]]] = defaultdict(list)
        for span in spans:
            place = ((span.start - zero) * scale, (span.end - span.start) * scale)
            places[span.action.kind, span.action.stage].append(place)
        for (kind, stage), found in places.items():
            axes.broken_barh(found, row, facecolor=_shade(COLOURS[kind], stages.index(stage), len(stages)), linewidth=0)


def simulation_of(measured: Timeline) -> Simulation:
    """The same computations in the same order, each of the mean duration that its stage and kind had. Transfers take no time.

    Raises ScheduleError where the order is none that ends, or a stage is missing.
    """
    return simulate([[span.action for span in spans] for spans in measured], costs_of(measured))


def costs_of(measured: Timeline) -> Costs:
    """Each stage's mean durations. A backward in one piece counts half as input and half as weight gradient."""
    seconds: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for span in (span for spans in measured for span in spans):
        kind, stage, taken = span.action.kind, span.action.stage, span.end - span.start
        if kind is Kind.BACKWARD:
            seconds[Kind.INPUT_GRADIENT, stage].append(taken / 2)
            seconds[Kind.WEIGHT_GRADIENT, stage].append(taken / 2)
        else:
            seconds[kind, stage].append(taken)
    stages = range(1 + max(span.action.stage for spans in measured for span in spans))
    forward, inputs, weights = (
        [fmean(seconds[kind, stage] or [0.0]) for stage in stages]
        for kind in (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
    )  # fmt: skip
    return Costs(forward, inputs, weights)


def micro_batches(timeline: Timeline) -> int:
    """How many micro-batches the step had."""
    return len({span.action.micro_batch for spans in timeline for span in spans})


# ---- small things ------------------------------------------------------------------------------------------


def _legend(figure: Figure, timeline: Timeline, corner: tuple[float, float]) -> None:
    """Name the colours of the kinds that occur, in one line. corner: its upper left one, in parts of the figure."""
    kinds = {span.action.kind for spans in timeline for span in spans}
    patches = [Patch(facecolor=colour, label=_NAMES[kind]) for kind, colour in COLOURS.items() if kind in kinds]
    patches.append(Patch(facecolor=GREY, label="bubble"))
    if any(len({span.action.stage for span in spans}) > 1 for spans in timeline):
        patches.append(Patch(facecolor=_shade(BLUE, 1, 2), label="paler: a rank's later stages"))
    figure.legend(
        handles=patches, loc="upper left", bbox_to_anchor=corner, ncols=len(patches),
        borderaxespad=0, borderpad=0, handlelength=1.2, handleheight=1.0, columnspacing=1.6,
    )  # fmt: skip


def _number_size(inches_per_digit: Sequence[float], row: float) -> float:
    """The largest size at which four of five blocks have room for their number."""
    room = sorted(inches_per_digit)[len(inches_per_digit) // 5] * 72
    return next((size for size in _NUMBER_SIZES if size * _LETTER * 1.3 < room and size < row * 72 * _BLOCK), _NUMBER_SIZES[-1])


def _shade(colour: str, index: int, count: int) -> tuple[float, float, float]:
    """A kind's colour, the paler the later the stage is among the `count` stages of its rank."""
    white = 0.6 * index / max(1, count - 1)
    red, green, blue = (part + (1 - part) * white for part in to_rgb(colour))
    return red, green, blue


def _luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _unit(seconds: float) -> tuple[float, str]:
    """The unit of an axis that long: how many there are in a second, and its name."""
    return (1e6, "microseconds") if seconds < 1e-3 else (1e3, "milliseconds") if seconds < 1 else (1.0, "seconds")


def _time(seconds: float) -> str:
    scale, unit = _unit(seconds)
    return f"{seconds * scale:.4g} {({'microseconds': 'µs', 'milliseconds': 'ms', 'seconds': 's'})[unit]}"
