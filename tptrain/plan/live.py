"""What a rank holds at each of its actions, beyond its weights: the engine's and the transfers' bookkeeping, in bytes.

A stage's input is a received buffer, which goes back to the pool after use, or another stage's output on the same rank. A sent tensor lives
until its send is finished: when its answer is taken, when more sends are under way than there are stages, or at the end of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.pipeline.actions import SENDS, Action, Kind
from tptrain.plan.stage_memory import StageMemory


@dataclass(frozen=True)
class Moment:
    """What is held while an action runs; fields as `RankMemory` has them."""

    gradients: int
    gathered: int
    activations: int
    extra: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.gathered + self.activations + self.extra + self.buffers


def moments(actions: Sequence[Action], stages: Sequence[StageMemory], ranks: Sequence[int]) -> list[Moment]:
    """Of one rank's actions, with transfers, and of the optimizer's step after them. stages, ranks: of the whole pipeline."""
    walk = _Walk(actions, stages, ranks)
    for action in actions:
        walk.do(action)
    walk.finish()
    return walk.moments


class _Walk:
    def __init__(self, actions: Sequence[Action], stages: Sequence[StageMemory], ranks: Sequence[int]) -> None:
        self.stages, self.ranks = stages, ranks
        self.moments: list[Moment] = []
        self.completing = {action.stage: action for action in actions if action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)}
        self.activations = 0  # kept, those put off among them
        self.gradients: dict[int, int] = {}  # by stage
        self.gathered_weights: dict[int, int] = {}
        self.gathered_gradients: dict[int, int] = {}
        self.received: set[Action] = set()  # receives whose buffers are in use
        self.lent: dict[tuple[int, int], int] = {}  # buffers that wait for a weight gradient
        self.free = 0  # buffers of receives that nobody uses
        self.sends: dict[Action, int] = {}
        self.here = 0  # from one stage to another of this rank
        self.logits = 0  # memory for logits that nobody uses
        self.message = stages[0].message

    def do(self, action: Action) -> None:
        """One action."""
        stage = self.stages[action.stage]
        if action.kind is Kind.FORWARD:
            self._forward(action, stage)
        elif action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
            self._backward(action, stage)
        elif action.kind is Kind.WEIGHT_GRADIENT:
            self._weight_gradient(action, stage)
        elif action.kind in SENDS:
            self.sends[action] = self.message
            self.here -= self.message
            while len(self.sends) > len(self.ranks):
                self.sends.pop(next(iter(self.sends)))
        else:
            self.received.add(action)
            self.free = max(0, self.free - self.message)

    def finish(self) -> None:
        """The optimizer's step."""
        self.sends.clear()
        self._note(0, 0)

    def _note(self, extra: int, activations: int) -> None:
        buffers = self.free + len(self.received) * self.message + sum(self.lent.values()) + sum(self.sends.values())
        gathered = sum(self.gathered_weights.values()) + sum(self.gathered_gradients.values())
        gradients, kept = sum(self.gradients.values()), self.activations + activations
        self.moments.append(Moment(gradients, gathered, kept, extra, buffers + self.here + self.logits))

    def _forward(self, action: Action, stage: StageMemory) -> None:
        _, number, m = action
        self.gathered_weights[number] = stage.gathered_weights
        if number > 0 and self.ranks[number - 1] == self.ranks[number]:
            self.here -= self.message  # it counts among the activations from here on
        self.received.discard(Action(Kind.RECEIVE_ACTIVATION, number, m))
        self.logits = max(0, self.logits - stage.logits)
        self._note(stage.forward_extra, stage.activations)
        self.activations += stage.activations
        if not stage.is_last:
            self.here += self.message

    def _backward(self, action: Action, stage: StageMemory) -> None:
        kind, number, m = action
        whole, last = kind is Kind.BACKWARD, self.completing[number] == action
        buffers = 0
        if not stage.is_last:
            self.sends.pop(Action(Kind.SEND_ACTIVATION, number, m), None)
        first = number not in self.gradients and number not in self.gathered_gradients
        if whole:
            self._note(stage.first_backward_extra if first else stage.backward_extra, 0)
            self.activations -= stage.activations
            self._make_gradients(number, stage)
            unmade = stage.unmade_gradients if first else 0
            if last and stage.gathered_end:
                self.gathered_weights[number], self.gathered_gradients[number] = stage.gathered_end, 0
                self.gradients[number], unmade = stage.gradients, 0
            self._note(stage.last_extra - unmade, stage.first_layer_activations)
            self._note(0, 0)
        else:
            self._note(stage.input_gradient_extra, 0)
            self.activations += stage.deferred - stage.activations
            self._note(stage.last_input_gradient_extra, stage.first_layer_activations - stage.first_layer_deferred)
        receive = Action(Kind.RECEIVE_GRADIENT, number, m)
        if receive in self.received:
            self.received.discard(receive)
            buffers += self.message
        elif not stage.is_last:
            self.here -= self.message
        if number > 0:
            self.here += self.message
            if self.ranks[number - 1] != self.ranks[number]:
                buffers += self.message  # the input's, until now among the activations
        if whole:
            self.free += buffers
            self.logits += stage.logits
            if last:
                self._reduce(number, stage)
        else:
            self.lent[number, m] = buffers

    def _weight_gradient(self, action: Action, stage: StageMemory) -> None:
        _, number, m = action
        self._note(0, 0)
        self._make_gradients(number, stage)
        self.activations -= stage.deferred
        self._note(0, 0)
        self.free += self.lent.pop((number, m))
        self.logits += stage.logits
        if self.completing[number] == action:
            self._reduce(number, stage)

    def _make_gradients(self, number: int, stage: StageMemory) -> None:
        if stage.gathered_weights:
            self.gathered_gradients[number] = stage.gathered_gradients
        else:
            self.gradients[number] = stage.gradients

    def _reduce(self, number: int, stage: StageMemory) -> None:
        """The stage's gradients are whole: with dp>1 each rank keeps its part, and the gathered weights go."""
        if not stage.gathered_weights:
            return
        self._note(stage.reducing, 0)
        del self.gathered_gradients[number], self.gathered_weights[number]
        self.gradients[number] = stage.gradients
