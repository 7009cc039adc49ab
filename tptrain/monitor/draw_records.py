"""The numbers of `metrics.jsonl` over the steps of a run, as pictures. A number that is not known is a gap in its line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from tptrain.monitor.draw_style import BLUE, GREEN, ORANGE, VERMILLION
from tptrain.monitor.metrics import Record
from tptrain.monitor.text import compact

_FEW = 30
"""Up to so many points each gets a marker."""


def loss(records: Sequence[Record]) -> Figure:
    """Training and validation loss over steps below, tokens above."""
    figure, (axes,) = _figure(1)
    for key, label, colour in (("loss", "training", BLUE), ("val_loss", "validation", VERMILLION)):
        steps, values = series(records, key)
        known = [value for value in values if math.isfinite(value)]
        if known:
            _line(axes, steps, values, colour, f"{label}, last {known[-1]:.3f}", marked=key == "val_loss")
    axes.set_ylabel("loss, nats a token")
    axes.legend()
    _token_axis(axes, records)
    return figure


def throughput(records: Sequence[Record], with_bubble: bool) -> Figure:
    """Tokens a second of the whole job; below it, if asked for and known, the measured bubble."""
    steps, bubbles = series(records, "bubble_fraction")
    has_bubble = with_bubble and any(map(math.isfinite, bubbles))
    figure, panels = _figure(1 + has_bubble)
    _line(panels[0], *series(records, "tokens_per_second"), BLUE)
    _from_zero(panels[0])
    panels[0].set_ylabel("tokens a second")
    panels[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    if has_bubble:
        _line(panels[1], steps, bubbles, GREEN)
        _from_zero(panels[1])
        panels[1].set_ylabel("bubble")
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    return figure


def memory(records: Sequence[Record]) -> Figure:
    """The peak so far of the rank that held most."""
    figure, (axes,) = _figure(1)
    steps, peaks = series(records, "peak_memory_bytes")
    scale, unit = (2.0**30, "GiB") if max(filter(math.isfinite, peaks)) >= 2**30 else (2.0**20, "MiB")
    _line(axes, steps, [peak / scale for peak in peaks], ORANGE)
    _from_zero(axes)
    axes.set_ylabel(f"peak memory of a rank, {unit}")
    return figure


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the key; nan where it is not known."""
    found = [(record["step"], record[key]) for record in records if key in record and "step" in record]
    return [step for step, _ in found], [math.nan if value is None else float(value) for _, value in found]


# ---- small things ------------------------------------------------------------------------------------------


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Panels one above the other, over the same steps."""
    figure = Figure(figsize=(9, 4.8 + 2.2 * (panels - 1)), layout="constrained")
    found = list(figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[1.8, 1.0][:panels])[:, 0])
    for axes in found:
        axes.grid(axis="y")
    found[-1].set_xlabel("step")
    found[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, found


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str = "", marked: bool = False) -> None:
    """One number over the steps."""
    axes.plot(steps, values, color=colour, label=label, marker="o" if marked or len(steps) <= _FEW else "")


def _from_zero(axes: Axes) -> None:
    """Show how large the changes are beside the whole."""
    axes.set_ylim(0, 1.1 * axes.dataLim.y1)


def _token_axis(axes: Axes, records: Sequence[Record]) -> None:
    """The tokens read by each of the steps that are marked below."""
    tokens = {record["step"]: record["tokens"] for record in records if record.get("tokens") is not None}
    if not tokens:
        return
    low, high = axes.get_xlim()
    places = [step for step in axes.get_xticks() if low <= step <= high and 0 <= step <= max(tokens)]
    top = axes.secondary_xaxis("top")
    top.set_xticks(places, [compact(_tokens_at(step, tokens)) for step in places])
    top.set_xlabel("tokens", labelpad=8)
    top.spines["top"].set_visible(False)


def _tokens_at(step: float, tokens: dict[int, int]) -> float:
    """Between two logged steps as many tokens as lie on the line between them; none before the first step."""
    known = {0: 0, **tokens}
    before = max(at for at in known if at <= step)
    after = min(at for at in known if at >= step)
    share = (step - before) / (after - before) if after > before else 0.0
    return known[before] + share * (known[after] - known[before])
