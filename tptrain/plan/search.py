"""The fastest layouts of a number of devices that fit into their memory.

Every layout gets its memory, exactly, and a step that it certainly does not beat (`bound.py`). Then the layouts wait in a queue, by their
bound, and the first of it is priced better: first its bound gets what dp and the end of the step add, then the whole step is simulated. What
comes out of the queue simulated is the next best, as all others have a bound that is no less. So few are simulated, and none is missed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from tptrain.config import Config, ConfigError, refuse
from tptrain.plan.forecast import Forecast, forecast
from tptrain.plan.layouts import Layout, Layouts
from tptrain.plan.pipeline import PipelinePlan
from tptrain.plan.prices import Prices
from tptrain.plan.time import StepTime, step_time


class Candidate(NamedTuple):
    """A layout at first sight."""

    layout: Layout
    memory_bytes: float
    """Of the rank that needs most."""
    missing_bytes: float
    """What that is beyond the device's memory; 0 where it fits."""
    least_seconds: float
    """A step takes no less."""


@dataclass(frozen=True)
class Priced:
    """A layout, simulated."""

    layout: Layout
    memory_bytes: float
    config: Config
    """Resolved."""
    pipeline: PipelinePlan
    time: StepTime

    @cached_property
    def forecast(self) -> Forecast:
        """All that is known of it."""
        return forecast(self.config, self.pipeline)


@dataclass(frozen=True)
class Found:
    """What a search found."""

    config: Config
    """What all layouts share."""
    devices: int
    candidates: list[Candidate]
    """All valid layouts."""
    best: list[Priced]
    """The fastest of those that fit, as many as plan.best asks for, the fastest first."""
    simulated: int
    """Layouts whose step was simulated."""
    refusals: list[ConfigError] = field(default_factory=list)
    """Why others that were tried are no layouts."""


def search(config: Config, devices: int, fixed: Mapping[str, Any] | None = None) -> Found:
    """Search the layouts of so many devices. config: typed, not resolved. fixed: keys of `parallel` that keep these values.

    Raises ConfigError where the hardware's memory or speed is unknown, and for what no search can vary.
    """
    layouts = Layouts(config, devices, fixed)
    device_bytes = config.hardware.memory_bytes
    if device_bytes is None:
        rule = "is unknown, so that a search could not say which layouts fit"
        raise refuse("hardware.memory_bytes", None, rule, "set it, or use hardware=h100 or another that says it")
    valid = list(layouts)
    prices = Prices(layouts, valid)
    candidates = []
    for layout in valid:
        memory = prices.memory_bytes(layout)
        candidates.append(Candidate(layout, memory, max(0.0, memory - device_bytes), prices.least_seconds(layout)))
    best, simulated = _fastest(prices, [each for each in candidates if not each.missing_bytes], config.plan.best)
    return Found(layouts.base, devices, candidates, best, simulated, layouts.refusals)


def _fastest(prices: Prices, fitting: list[Candidate], count: int) -> tuple[list[Priced], int]:
    """The `count` fastest, and how many had to be simulated."""
    queue: list[tuple[float, int, int]] = [(each.least_seconds, 0, number) for number, each in enumerate(fitting)]
    heapq.heapify(queue)
    priced: dict[int, Priced] = {}
    best: list[Priced] = []
    while queue and len(best) < count:
        seconds, known, number = heapq.heappop(queue)
        layout = fitting[number].layout
        if known == 0:
            heapq.heappush(queue, (seconds + prices.outside_seconds(layout), 1, number))
        elif known == 1:
            config, pipeline = prices.config(layout), prices.pipeline(layout)
            priced[number] = Priced(layout, fitting[number].memory_bytes, config, pipeline, step_time(config, pipeline))
            heapq.heappush(queue, (priced[number].time.step_seconds, 2, number))
        else:
            best.append(priced[number])
    return best, len(priced)
