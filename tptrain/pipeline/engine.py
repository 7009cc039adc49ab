"""Runs any schedule on any stages.

The engine knows no model. A stage is a callable (input, targets or None, micro-batch's number) -> output; the first stage's input
is a micro-batch of the batch, the last stage's output with targets is the micro-batch's summed loss. A stage keeps no view of its
input, and none of its output's gradient, for longer than until its weight gradients are made.

    forward          input ── stage ── output ──> next stage          kept: the input, and what autograd saves
    backward         input's gradient <── backward ── output's gradient    weight gradients: at once, or as the
    input gradient   the same, the weight gradients put off                schedule asks, in an action of their own
    weight gradient  what was put off
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tptrain.pipeline.actions import Action, Kind, peer_stage
from tptrain.pipeline.clock import Clock
from tptrain.pipeline.timeline import Span
from tptrain.pipeline.transfer import Message, Transfer

Stage = Callable[[Tensor, Tensor | None, int], Tensor]
Task = tuple[int, int]
"""A stage and a micro-batch."""


class Backward(Protocol):
    """What a backward needs that is not the pipeline's to know."""

    def before(self, stage: int, last: bool) -> None:
        """Called before each backward of a stage; last: whether it completes the stage's gradients."""

    def after_weight_gradients(self, stage: int, last: bool) -> None:
        """Called after a micro-batch's put-off weight gradients were made; last: whether they complete the stage's gradients."""

    def putting_off(self) -> AbstractContextManager[list[Callable[[], None]]]:
        """In the block, weight gradients are not made; the list gets what makes them."""


class _Live(NamedTuple):
    """What a micro-batch keeps on a stage from its forward to its backward."""

    x: Tensor
    x_is_buffer: bool
    output: GradientEdge


class PipelineEngine:
    """One rank's part of the pipeline: its stages, and the micro-batches in flight on them."""

    def __init__(self, stages: Mapping[int, Stage], ranks: Sequence[int], transfer: Transfer) -> None:
        """stages: this rank's, by their numbers in the pipeline. ranks: the pipeline rank of each stage."""
        self.stages, self.ranks, self.transfer = stages, ranks, transfer
        self.last_stage = len(ranks) - 1
        self.clock = Clock(transfer.mesh.device)
        self._receives: dict[Action, Message] = {}
        self._live: dict[Task, _Live] = {}
        self._weight_work: dict[Task, list[Callable[[], None]]] = {}  # from input gradient to weight gradient
        self._lent: dict[Task, list[Tensor]] = {}  # buffers to give back after the weight gradient
        self._activations: dict[Task, Tensor] = {}  # outputs, from forward to their send or the next stage here
        self._gradients: dict[Task, Tensor] = {}  # inputs' gradients, from backward to their send or the stage before here

    @property
    def spans(self) -> list[Span]:
        """What the last step, or the last forwards alone, computed when."""
        return self.clock.spans()

    def train(
        self,
        actions: Sequence[Action],
        inputs: Sequence[Tensor] | None,
        targets: Sequence[Tensor] | None,
        loss_scale: Tensor,
        backward: Backward,
    ) -> Tensor:
        """Run forwards and backwards; gradients accumulate in the stages' parameters.

        inputs, targets: the micro-batches, on the ranks of the first and of the last stage.
        loss_scale: scalar that the summed losses are multiplied by for the gradient, on the last stage.
        Returns the summed loss of all micro-batches (fp64 scalar), zero off the last stage.
        """
        completing = {action.stage: action for action in actions if action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)}
        loss = torch.zeros((), dtype=torch.float64, device=self.transfer.mesh.device)
        self.clock.restart()
        for action in actions:
            kind, stage, _ = action
            if kind is Kind.FORWARD:
                made = self._forward(action, inputs, targets)
                if made is not None:
                    loss += made.detach()
            elif kind is Kind.WEIGHT_GRADIENT:
                self._weight_gradient(action)
                backward.after_weight_gradients(stage, completing[stage] == action)
            elif kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
                backward.before(stage, completing[stage] == action)
                self._backward(action, loss_scale, backward)
            else:
                self._communicate(action)
        self.transfer.flush()
        return loss

    @torch.no_grad()
    def infer(self, actions: Sequence[Action], inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None) -> list[Tensor]:
        """Run forwards alone. Returns the last stage's outputs in the order of the micro-batches; elsewhere nothing."""
        outputs = []
        self.clock.restart()
        for action in actions:
            if action.kind is Kind.FORWARD:
                made = self._forward(action, inputs, targets)
                if made is not None:
                    outputs.append(made)
            else:
                self._communicate(action)
        self.transfer.flush()
        return outputs

    # ---- computations ----------------------------------------------------------------------------------------

    def _forward(self, action: Action, inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None) -> Tensor | None:
        """Returns the output of the last stage; that of others is on its way, and not held here."""
        _, stage, m = action
        training, buffer = torch.is_grad_enabled(), False
        if stage == 0:
            assert inputs is not None
            x = inputs[m]
        else:
            x, buffer = self._take(self._activations, (stage - 1, m), action._replace(kind=Kind.RECEIVE_ACTIVATION))
            x.requires_grad_(training)
        with self.clock.computing(action):
            output = self.stages[stage](x, targets[m] if targets is not None and stage == self.last_stage else None, m)
        buffer = buffer and not _share_memory(x, output)
        if training:
            self._live[stage, m] = _Live(x, buffer, get_gradient_edge(output))
        elif buffer:
            self.transfer.reuse(x)
        if stage == self.last_stage:
            return output
        self._activations[stage, m] = output.detach()
        return None

    def _backward(self, action: Action, loss_scale: Tensor, backward: Backward) -> None:
        kind, stage, m = action
        x, x_is_buffer, output = self._live.pop((stage, m))
        lent = [x] if x_is_buffer else []
        if stage == self.last_stage:
            gradient = None
        else:
            gradient, buffer = self._take(self._gradients, (stage + 1, m), action._replace(kind=Kind.RECEIVE_GRADIENT))
            self.transfer.finish(action._replace(kind=Kind.SEND_ACTIVATION))  # whoever answers has received
            lent += [gradient] if buffer else []
        with self.clock.computing(action):
            if kind is Kind.BACKWARD:
                _run_backward(output, gradient, loss_scale)
            else:
                with backward.putting_off() as work:
                    _run_backward(output, gradient, loss_scale)
                self._weight_work[stage, m] = work
        if stage > 0:
            assert x.grad is not None
            made, x.grad = x.grad, None
            lent = [buffer for buffer in lent if not _share_memory(buffer, made)]
            self._gradients[stage, m] = made
        if kind is Kind.BACKWARD:
            self._give_back(lent)
        else:
            self._lent[stage, m] = lent

    @torch.no_grad()
    def _weight_gradient(self, action: Action) -> None:
        task = (action.stage, action.micro_batch)
        with self.clock.computing(action):
            work = self._weight_work.pop(task)
            while work:
                work.pop(0)()  # each lets go of its matrices
        self._give_back(self._lent.pop(task))

    # ---- what goes between stages ------------------------------------------------------------------------------

    def _take(self, here: dict[Task, Tensor], task: Task, receive: Action) -> tuple[Tensor, bool]:
        """What another stage made: from this rank, or received; and whether it lies in a buffer."""
        if self.ranks[task[0]] == self.ranks[receive.stage]:
            return here.pop(task), False
        return self._receives.pop(receive).wait(), True

    def _communicate(self, action: Action) -> None:
        peer, task = self.ranks[peer_stage(action)], (action.stage, action.micro_batch)
        if action.kind is Kind.SEND_ACTIVATION:
            self.transfer.send(action, peer, self._activations.pop(task), len(self.ranks))
        elif action.kind is Kind.SEND_GRADIENT:
            self.transfer.send(action, peer, self._gradients.pop(task), len(self.ranks))
        else:
            self._receives[action] = self.transfer.receive(action, peer)

    def _give_back(self, buffers: list[Tensor]) -> None:
        for buffer in buffers:
            self.transfer.reuse(buffer)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether one is, or may be, made of the other's memory."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata  # also of tensors without values, which have no address


def _run_backward(output: GradientEdge, gradient: Tensor | None, loss_scale: Tensor) -> None:
    """Backward from a stage's output; of the last stage, from its loss."""
    torch.autograd.backward(output, loss_scale.float() if gradient is None else gradient)
