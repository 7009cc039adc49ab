"""What a schedule costs, before it runs: when each rank computes what, how long it idles, how many activations it keeps.

    1f1b, p=2, m=2, a backward twice a forward: a column is a second, a third of the ranks' time is idle, (p - 1) / (m + p - 1)

    rank 0  F0 F1 .. .. B0 B0 .. B1 B1
    rank 1  .. F0 B0 B0 F1 B1 B1 .. ..

The model is the engine's: a rank takes its computations in order, each as soon as the one before has ended and its input has
arrived. Sends and receives take no time of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.pipeline.actions import COMPUTATIONS, Action, Kind, Schedule, ScheduleError, placement, source_of
from tptrain.pipeline.timeline import Span, Timeline, bubble_fraction, duration


@dataclass(frozen=True)
class Costs:
    """Seconds, or any other unit of time. Of each stage: what one micro-batch takes."""

    forward: Sequence[float]
    """A forward, of each stage."""
    input_gradient: Sequence[float]
    """The gradient of a stage's input, of each stage."""
    weight_gradient: Sequence[float]
    """The gradients of a stage's weights, of each stage. A backward that is one action costs both."""
    transfer: float = 0
    """From the end of a computation until another rank can use what it made."""

    def of(self, computation: Action) -> float:
        """Seconds of a computation."""
        kind, stage, _ = computation
        if kind is Kind.FORWARD:
            return self.forward[stage]
        if kind is Kind.INPUT_GRADIENT:
            return self.input_gradient[stage]
        if kind is Kind.WEIGHT_GRADIENT:
            return self.weight_gradient[stage]
        return self.input_gradient[stage] + self.weight_gradient[stage]


@dataclass(frozen=True)
class Simulation:
    """A step as it will run, from 0 seconds on."""

    timeline: Timeline
    """For each rank, its computations with their start and end."""

    @property
    def step_seconds(self) -> float:
        """Seconds from the first computation's start to the last one's end."""
        return duration(self.timeline)

    @property
    def bubble_fraction(self) -> float:
        """The share of the ranks' time in which they do not compute."""
        return bubble_fraction(self.timeline)

    @property
    def live(self) -> list[list[tuple[float, int]]]:
        """For each rank the changes of its live activations, as (seconds, activations from then on).

        The activations that one stage keeps of one micro-batch count as one, from the forward's start to the end of the backward; where
        the backward comes in two parts, of the weight gradient, which needs the stage's inputs.
        """
        return [_live(spans) for spans in self.timeline]

    @property
    def peaks(self) -> list[int]:
        """The most live activations of each rank."""
        return [max((count for _, count in changes), default=0) for changes in self.live]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run a schedule on paper. Its transfers, if it names them, are passed over: they follow from the computations.

    Raises ScheduleError where a rank would wait for ever, and for a stage on no rank or on two.
    """
    holders = placement(schedule)
    computations = [[action for action in actions if action.kind in COMPUTATIONS] for actions in schedule]
    timeline: Timeline = [[] for _ in schedule]
    ends: dict[Action, float] = {}  # of what is done; a backward stands as the input gradient
    waiting: dict[Action, int] = {}  # ranks, by what they wait for, which only one other rank does
    movable = list(range(len(schedule)))
    while movable:
        rank = movable.pop()
        spans = timeline[rank]
        while len(spans) < len(computations[rank]):
            action = computations[rank][len(spans)]
            start = spans[-1].end if spans else 0
            need = _need(action, len(holders))
            if need is not None:
                if need not in ends:
                    waiting[need] = rank
                    break
                start = max(start, ends[need] + (0 if holders[need.stage] == rank else costs.transfer))
            end = start + costs.of(action)
            spans.append(Span(action, start, end))
            made = action._replace(kind=Kind.INPUT_GRADIENT) if action.kind is Kind.BACKWARD else action
            ends[made] = end
            if made in waiting:
                movable.append(waiting.pop(made))
    for rank, spans in enumerate(timeline):
        if len(spans) < len(computations[rank]):
            action = computations[rank][len(spans)]
            raise ScheduleError(f"rank {rank}, position {schedule[rank].index(action)}: {action} waits for ever")
    return Simulation(timeline)


def _need(action: Action, stages: int) -> Action | None:
    """The computation whose end this one waits for. What that needed itself has ended too."""
    kind, stage, m = action
    if kind is Kind.WEIGHT_GRADIENT:
        return Action(Kind.INPUT_GRADIENT, stage, m)
    source = source_of(action, stages)
    return Action(Kind.FORWARD, stage, m) if source is None and kind is not Kind.FORWARD else source


def _live(spans: Sequence[Span]) -> list[tuple[float, int]]:
    changes, count = [], 0
    for span in spans:
        if span.action.kind is Kind.FORWARD:
            count += 1
            changes.append((span.start, count))
        elif span.action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT):
            count -= 1
            changes.append((span.end, count))
    return changes
