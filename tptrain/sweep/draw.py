"""A sweep as a picture, `sweep.png`: final validation loss above, tokens a second below, one point a job that is done.

one swept key          along x: to scale where its values are numbers, else one place a value
two                    the one of numbers along x, a colour for each value of the other
none, or more than two the jobs by number
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from tptrain.monitor.draw_style import BLUE, GREEN, ORANGE, STYLE, VERMILLION, png
from tptrain.sweep.results import JobResult, swept_keys
from tptrain.sweep.table import summary

_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE)
_MOST_TICKS = 12
"""Of values that are numbers; more would run into each other."""


def picture(results: Sequence[JobResult]) -> bytes | None:
    """`sweep.png`, or None where no job has a number to show."""
    done = [job for job in results if job.status == "done"]
    loss = "val_loss" if any(job.val_loss is not None for job in done) else "loss"
    if not any(getattr(job, key) is not None for job in done for key in (loss, "tokens_per_second")):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 7.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        across, colours = axes_of(results)
        _draw(upper, results, loss, across, colours)
        _draw(lower, results, "tokens_per_second", across, colours)
        upper.set_title(summary(results))
        upper.set_ylabel(f"final {'validation' if loss == 'val_loss' else 'training'} loss, nats a token")
        lower.set_ylabel("tokens a second")
        lower.yaxis.set_major_formatter(EngFormatter(sep=""))
        lower.set_ylim(bottom=0)
        lower.set_xlabel(across or "job")
        if colours:
            upper.legend(title=colours)
        return png(figure)


def axes_of(results: Sequence[JobResult]) -> tuple[str | None, str | None]:
    """The swept keys that lie along x and that choose the colour; None for the job's number, and for one colour."""
    keys = swept_keys(results)
    if len(keys) == 1:
        return keys[0], None
    if len(keys) != 2:
        return None, None
    values = {key: _values(results, key) for key in keys}
    along = max(keys, key=lambda key: (_are_numbers(values[key]), len(values[key])))
    return along, keys[1 - keys.index(along)]


def _draw(axes: Axes, results: Sequence[JobResult], number: str, across: str | None, colours: str | None) -> None:
    """One number of the jobs that have it."""
    axes.grid(axis="y")
    labels = [str(job.number) for job in results] if across is None else _values(results, across)
    numeric = across is not None and _are_numbers(labels)
    places = {label: float(label) if numeric else float(index) for index, label in enumerate(labels)}
    groups = _values(results, colours) if colours else [None]
    for index, group in enumerate(groups):
        jobs = [job for job in results if group is None or job.overrides.get(colours or "", "") == group]
        points = sorted((places[_value(job, across)], getattr(job, number)) for job in jobs if getattr(job, number) is not None)
        colour = _COLOURS[index] if len(groups) <= len(_COLOURS) else colormaps["viridis"](index / len(groups))
        axes.plot(*zip(*points, strict=True) if points else ((), ()), "o-" if numeric else "o", color=colour, label=group or "-")
    _mark(axes, places, numeric)


def _mark(axes: Axes, places: dict[str, float], numeric: bool) -> None:
    """Name the places along x, also those of jobs without a number."""
    low, high = min(places.values()), max(places.values())
    if numeric and low > 0 and high >= 8 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.3)
    else:
        margin = 0.05 * (high - low) if numeric and high > low else 0.5
        axes.set_xlim(low - margin, high + margin)
    if not numeric or len(places) <= _MOST_TICKS:
        crowded = sum(map(len, places)) > 60
        axes.set_xticks(list(places.values()), list(places), rotation=30 if crowded else 0, ha="right" if crowded else "center")
        axes.xaxis.set_minor_locator(NullLocator())


def _value(job: JobResult, key: str | None) -> str:
    return str(job.number) if key is None else job.overrides.get(key, "")


def _values(results: Sequence[JobResult], key: str) -> list[str]:
    """Each value once, in the order of the jobs."""
    return list(dict.fromkeys(job.overrides.get(key, "") for job in results))


def _are_numbers(values: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in values)
    except ValueError:
        return False
