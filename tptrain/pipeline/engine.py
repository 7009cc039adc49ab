"""Runs any schedule on any stage.

The engine knows no model. A stage is a callable (input, targets or None, micro-batch's number) -> output; the first stage's input
is a micro-batch of the batch, the last stage's output with targets is the micro-batch's summed loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tptrain.pipeline.actions import Action, Kind
from tptrain.pipeline.transfer import Receive, Transfer

Stage = Callable[[Tensor, Tensor | None, int], Tensor]


class PipelineEngine:
    """One rank's part of the pipeline: its stage, and the micro-batches in flight on it."""

    def __init__(self, stage: Stage, stage_index: int, num_stages: int, transfer: Transfer) -> None:
        self.stage = stage
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.transfer = transfer
        self._receives: dict[tuple[Kind, int], Receive] = {}
        self._live: dict[int, tuple[Tensor, Tensor]] = {}  # micro-batch -> (input, output), from forward to backward
        self._gradients: dict[int, Tensor] = {}  # micro-batch -> input gradient, from backward to its send
        self._activations: dict[int, Tensor] = {}  # micro-batch -> output, from forward to its send

    def train(
        self,
        actions: Sequence[Action],
        inputs: Sequence[Tensor] | None,
        targets: Sequence[Tensor] | None,
        loss_scale: Tensor,
        before_backward: Callable[[bool], None],
    ) -> Tensor:
        """Run forwards and backwards; gradients accumulate in the stage's parameters.

        inputs, targets: the micro-batches, on the first and the last stage.
        loss_scale: scalar that the summed losses are multiplied by for the gradient, on the last stage.
        before_backward: called before each backward with whether it is the stage's last.
        Returns the summed loss of all micro-batches (fp64 scalar), zero off the last stage.
        """
        last_backward = max((i for i, action in enumerate(actions) if action.kind is Kind.BACKWARD), default=-1)
        loss = torch.zeros((), dtype=torch.float64, device=self.transfer.mesh.device)
        for position, action in enumerate(actions):
            if action.kind is Kind.FORWARD:
                output = self._forward(action, inputs, targets)
                if self.is_last:
                    loss += output.detach()
            elif action.kind is Kind.BACKWARD:
                before_backward(position == last_backward)
                self._backward(action, loss_scale)
            else:
                self._communicate(action)
        self.transfer.flush()
        return loss

    @torch.no_grad()
    def infer(self, actions: Sequence[Action], inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None) -> list[Tensor]:
        """Run forwards alone. Returns the last stage's outputs in the order of the micro-batches; elsewhere nothing."""
        outputs = []
        for action in actions:
            if action.kind is Kind.FORWARD:
                output = self._forward(action, inputs, targets)
                self._live.clear()
                if self.is_last:
                    outputs.append(output)
            else:
                self._communicate(action)
        self.transfer.flush()
        return outputs

    def _forward(self, action: Action, inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None) -> Tensor:
        m = action.micro_batch
        if self.is_first:
            assert inputs is not None
            x = inputs[m]
        else:
            x = self._receives.pop((Kind.RECEIVE_ACTIVATION, m)).wait()
            x.requires_grad_(torch.is_grad_enabled())
        output = self.stage(x, targets[m] if targets is not None and self.is_last else None, m)
        self._live[m] = (x, output)
        if not self.is_last:
            self._activations[m] = output.detach()
        return output

    def _backward(self, action: Action, loss_scale: Tensor) -> None:
        x, output = self._live.pop(action.micro_batch)
        received = None if self.is_last else self._receives.pop((Kind.RECEIVE_GRADIENT, action.micro_batch)).wait()
        torch.autograd.backward(output, loss_scale.to(output.dtype) if received is None else received)
        if not self.is_first:
            assert x.grad is not None
            self._gradients[action.micro_batch] = x.grad

    def _communicate(self, action: Action) -> None:
        if action.kind is Kind.SEND_ACTIVATION:
            self.transfer.send(action, self._activations.pop(action.micro_batch))
        elif action.kind is Kind.SEND_GRADIENT:
            self.transfer.send(action, self._gradients.pop(action.micro_batch))
        else:
            self._receives[action.kind, action.micro_batch] = self.transfer.receive(action)
