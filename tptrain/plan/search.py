"""The fastest layouts of a number of devices that fit into their memory.

Every layout gets a memory that it certainly needs and a step that it certainly does not beat (`least_memory.py`, `bound.py`), which take
microseconds. Then those that may fit wait in a queue, by their bound, and what comes to its front is priced better:

    its memory with what a backward needs, its bound with what dp and the step's end add  ->  its memory exactly, its step simulated

What comes out of the queue simulated is the next best, as all others have a bound that is no less. So few are simulated, and none is
missed.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tptrain.config import Config, ConfigError, refuse
from tptrain.plan.forecast import Forecast, forecast
from tptrain.plan.layouts import Layout, Layouts
from tptrain.plan.pipeline import PipelinePlan
from tptrain.plan.prices import Prices
from tptrain.plan.time import StepTime, step_time


@dataclass
class Candidate:
    """A layout, as far as it has been priced."""

    layout: Layout
    least_bytes: float
    """The fullest rank needs no less."""
    least_seconds: float | None = None
    """A step takes no less; None: not worked out, as it does not fit."""
    memory_bytes: float | None = None
    """What the fullest rank needs, where that was worked out."""
    step_seconds: float | None = None
    """What a step takes, where it came to that."""

    def missing_bytes(self, device_bytes: float) -> float:
        """What is missing in a device's memory, at least; 0 where it fits or may fit."""
        return max(0.0, self.least_bytes - device_bytes)


@dataclass(frozen=True)
class Priced:
    """A layout, simulated."""

    layout: Layout
    config: Config
    """Resolved."""
    pipeline: PipelinePlan
    memory_bytes: float
    """What the fullest rank needs."""
    time: StepTime

    @cached_property
    def forecast(self) -> Forecast:
        """All that is known of it."""
        return forecast(self.config, self.pipeline, self.time)


@dataclass(frozen=True)
class Found:
    """What a search found."""

    config: Config
    """What all layouts share."""
    devices: int
    device_bytes: float
    candidates: list[Candidate]
    """All valid layouts."""
    best: list[Priced]
    """The fastest of those that fit, as many as plan.best asks for, the fastest first."""
    nearest: Candidate | None
    """Where none fits: the layout that needs least memory."""
    refusals: list[ConfigError]
    """Why others that were tried are no layouts."""

    @property
    def unfitting(self) -> list[Candidate]:
        """Layouts that certainly do not fit."""
        return [each for each in self.candidates if each.missing_bytes(self.device_bytes)]


def search(config: Config, devices: int, fixed: Mapping[str, Any] | None = None) -> Found:
    """Search the layouts of so many devices. config: typed, not resolved. fixed: keys of `parallel` that keep these values.

    Raises ConfigError where the hardware's memory or speed is unknown, and for what no search can vary.
    """
    layouts = Layouts(config, devices, fixed)
    device_bytes = config.hardware.memory_bytes
    if device_bytes is None:
        rule = "is unknown, so that a search could not say which layouts fit"
        raise refuse("hardware.memory_bytes", None, rule, "set it, or use hardware=h100 or another that says it")
    prices, candidates = Prices(layouts), []
    for layout in layouts:
        its = prices.config(layout)
        candidate = Candidate(layout, prices.least_bytes(layout, its))
        if not candidate.missing_bytes(device_bytes):
            candidate.least_seconds = prices.least_seconds(layout, its)
        candidates.append(candidate)
    best = _fastest(prices, candidates, device_bytes, config.plan.best)
    nearest = None if best else _nearest(prices, candidates)
    return Found(layouts.base, devices, device_bytes, candidates, best, nearest, layouts.refusals)


def _fastest(prices: Prices, candidates: list[Candidate], device_bytes: float, count: int) -> list[Priced]:
    """The `count` fastest of those that fit. Notes in the candidates what it works out."""
    queue = [(each.least_seconds, 0, number) for number, each in enumerate(candidates) if each.least_seconds is not None]
    heapq.heapify(queue)
    priced: dict[int, Priced] = {}
    best: list[Priced] = []
    while queue and len(best) < count:
        seconds, known, number = heapq.heappop(queue)
        if known == 2:
            best.append(priced[number])
            continue
        candidate = candidates[number]
        layout, config = candidate.layout, prices.config(candidate.layout)
        if known == 0:
            candidate.least_bytes = prices.likely_bytes(layout, config)
            if candidate.missing_bytes(device_bytes):
                continue
            seconds = candidate.least_seconds = seconds + prices.outside_seconds(layout, config)
        else:
            candidate.least_bytes = prices.bytes_of_fullest(layout, config, limit=device_bytes)
            if candidate.missing_bytes(device_bytes):
                continue
            candidate.memory_bytes = candidate.least_bytes
            pipeline = prices.pipeline(layout, config)
            priced[number] = Priced(layout, config, pipeline, candidate.memory_bytes, step_time(config, pipeline))
            seconds = candidate.step_seconds = priced[number].time.step_seconds
        heapq.heappush(queue, (seconds, known + 1, number))
    return best


def _nearest(prices: Prices, candidates: list[Candidate]) -> Candidate | None:
    """Where none fits: that which needs least memory, with how much."""
    queue = [(each.least_bytes, False, number) for number, each in enumerate(candidates)]
    heapq.heapify(queue)
    while queue:
        size, is_exact, number = heapq.heappop(queue)
        candidate = candidates[number]
        if is_exact:
            candidate.least_bytes = candidate.memory_bytes = size
            return candidate
        exact = prices.bytes_of_fullest(candidate.layout, prices.config(candidate.layout))
        heapq.heappush(queue, (exact, True, number))
    return None
