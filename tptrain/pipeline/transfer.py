"""Tensors between neighbouring stages, by isend and irecv.

Nothing here waits for the device or for more than the one request that is needed. A sent tensor is kept until its
send has completed, as its memory may not be reused before; at most as many as there are stages are under way at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.mesh import Mesh
from tptrain.pipeline.actions import Action, Kind


class TransferError(RuntimeError):
    """A neighbour did not answer in time, or is gone."""


@dataclass
class Receive:
    """A receive that has started."""

    action: Action
    peer: int
    tensor: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The tensor, once it is here. Raises TransferError that names the action and the peer."""
        _wait(self.work, self.action, self.peer)
        return self.tensor


class Transfer:
    """Sends and receives tensors of one shape between this rank and its neighbours in the pipeline."""

    def __init__(self, mesh: Mesh, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.mesh, self.shape, self.dtype = mesh, shape, dtype
        self._sends: deque[tuple[dist.Work, Tensor, Action, int]] = deque()

    def send(self, action: Action, tensor: Tensor) -> None:
        """Start sending what `action` names to the neighbour it is for."""
        peer, group = self._channel(action)
        tensor = tensor.contiguous()
        work = dist.isend(tensor, peer, group=group)
        assert work is not None
        self._sends.append((work, tensor, action, peer))
        while len(self._sends) > self.mesh.pp_size:  # gloo does not say that a send is complete until it is waited for
            self._finish_oldest_send()

    def receive(self, action: Action) -> Receive:
        """Start receiving what `action` names."""
        peer, group = self._channel(action)
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.mesh.device)
        work = dist.irecv(tensor, peer, group=group)
        assert work is not None
        return Receive(action, peer, tensor, work)

    def flush(self) -> None:
        """Wait until everything sent has left, and let go of it."""
        while self._sends:
            self._finish_oldest_send()

    def _finish_oldest_send(self) -> None:
        work, _, action, peer = self._sends.popleft()
        _wait(work, action, peer)

    def _channel(self, action: Action) -> tuple[int, dist.ProcessGroup]:
        """The neighbour's global rank and the group of the direction."""
        forward = action.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION)
        up = action.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT)
        peer = self.mesh.pp_ranks[action.stage + (1 if up else -1)]
        return peer, self.mesh.pp_forward if forward else self.mesh.pp_backward


def _wait(work: dist.Work, action: Action, peer: int) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        what = {
            Kind.SEND_ACTIVATION: "sending the activation", Kind.RECEIVE_ACTIVATION: "waiting for the activation",
            Kind.SEND_GRADIENT: "sending the gradient", Kind.RECEIVE_GRADIENT: "waiting for the gradient",
        }[action.kind]  # fmt: skip
        direction = "to" if action.kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT) else "from"
        where = f"rank {dist.get_rank()} (stage {action.stage})"
        raise TransferError(f"{where} gave up {what} of micro-batch {action.micro_batch} {direction} rank {peer}: {error}") from error
