"""What a rank did when: the record that the engine makes of a step, the simulator predicts, and the pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tptrain.pipeline.actions import Action


class Span(NamedTuple):
    """One computation of one rank: a forward, a backward, an input gradient or a weight gradient."""

    action: Action
    start: float
    """Seconds on the clock of the timeline it belongs to."""
    end: float


Timeline = list[list[Span]]
"""For each pipeline rank, its computations in the order in which they ran."""


def duration(timeline: Timeline) -> float:
    """Seconds from the first computation's start to the last one's end, over all ranks."""
    spans = [span for rank in timeline for span in rank]
    return max(span.end for span in spans) - min(span.start for span in spans) if spans else 0.0


def bubble_fraction(timeline: Timeline) -> float:
    """The share of the ranks' time in which they do not compute: 1 - busy / (ranks * duration)."""
    whole = duration(timeline) * len(timeline)
    return 1 - sum(busy(spans) for spans in timeline) / whole if whole else 0.0


def busy(spans: Sequence[Span]) -> float:
    """Seconds in which one rank computes."""
    return sum(span.end - span.start for span in spans)
