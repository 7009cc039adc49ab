"""Tensors between neighbouring stages on different ranks, by isend and irecv.

Nothing here waits for the device or for more than the one request that is needed. A sent tensor is kept until its
send has completed, as its memory may not be reused before. Received tensors lie in buffers that go from micro-batch to micro-batch.

Messages to higher ranks travel in one group, messages to lower ranks in another. So between two ranks each group carries one
direction alone, also where the previous and the next rank are the same one, and the order in it is that of the schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.mesh import Mesh
from tptrain.pipeline.actions import Action, Kind


class TransferError(RuntimeError):
    """A neighbour did not answer in time, or is gone."""

    def __init__(self, message: str, waited_for: int) -> None:
        """waited_for: the neighbour, counted over the whole job."""
        super().__init__(message)
        self.waited_for = waited_for


class Message(NamedTuple):
    """A send or a receive that has started."""

    action: Action
    peer: int
    """The other rank, counted over the whole job."""
    tensor: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The tensor, once it is here or has left. Raises TransferError that names the action and the peer."""
        try:
            self.work.wait()
        except RuntimeError as error:
            message = f"rank {dist.get_rank()} gave up {_WAITING[self.action.kind].format(self)}: {error}"
            raise TransferError(message, self.peer) from error
        return self.tensor


class Transfer:
    """Sends and receives tensors of one shape between this rank and others of its pipeline."""

    def __init__(self, mesh: Mesh, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.mesh, self.shape, self.dtype = mesh, shape, dtype
        self._sends: dict[Action, Message] = {}  # the oldest first
        self._free: list[Tensor] = []

    def send(self, action: Action, peer: int, tensor: Tensor, most: int) -> None:
        """Start sending what `action` names to pipeline rank `peer`; wait while more than `most` sends are under way."""
        tensor, rank = tensor.contiguous(), self.mesh.pp_ranks[peer]
        work = dist.isend(tensor, rank, group=self._group(self.mesh.pp_rank, peer))
        assert work is not None
        self._sends[action] = Message(action, rank, tensor, work)
        while len(self._sends) > most:  # gloo does not say that a send is complete until it is waited for
            self.finish(next(iter(self._sends)))

    def finish(self, send: Action) -> None:
        """Wait until a send is complete, if it is still under way, and let go of its tensor."""
        message = self._sends.pop(send, None)
        if message is not None:
            message.wait()

    def receive(self, action: Action, peer: int) -> Message:
        """Start receiving what `action` names from pipeline rank `peer`."""
        tensor = self._free.pop() if self._free else torch.empty(self.shape, dtype=self.dtype, device=self.mesh.device)
        work = dist.irecv(tensor, self.mesh.pp_ranks[peer], group=self._group(peer, self.mesh.pp_rank))
        assert work is not None
        return Message(action, self.mesh.pp_ranks[peer], tensor, work)

    def reuse(self, buffer: Tensor) -> None:
        """Take back the tensor of a receive that nobody reads any more."""
        self._free.append(buffer.detach())

    def flush(self) -> None:
        """Wait until everything sent has left, and let go of it."""
        while self._sends:
            self.finish(next(iter(self._sends)))

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        """Where messages from one pipeline rank to another travel."""
        return self.mesh.pp_up if source < target else self.mesh.pp_down


_WAITING = {
    Kind.SEND_ACTIVATION: "sending the activation of stage {0.action.stage}, micro-batch {0.action.micro_batch}, to rank {0.peer}",
    Kind.SEND_GRADIENT: "sending the gradient of stage {0.action.stage}, micro-batch {0.action.micro_batch}, to rank {0.peer}",
    Kind.RECEIVE_ACTIVATION: "waiting for the activation of stage {0.action.stage}, micro-batch {0.action.micro_batch}, from rank {0.peer}",
    Kind.RECEIVE_GRADIENT: "waiting for the gradient of stage {0.action.stage}, micro-batch {0.action.micro_batch}, from rank {0.peer}",
}
