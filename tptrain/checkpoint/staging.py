"""Memory that a rank copies its part of a checkpoint into, so that training can go on while it is written.

It is made once, in the background, and kept: as large as what the rank writes, in the host's memory, pinned where the values are on a GPU.
A page that was never touched costs the first copy into it a page fault, so each one is touched beforehand.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tptrain.tensor_parallel.parameter import local_part

_ALIGNMENT_BYTES = 64


class Staging:
    """Room for one set of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """tensors: those that will be copied, of any values."""
        self.on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        places, total = {}, 0
        for key, tensor in tensors.items():
            places[key], total = total, total + -(-local_part(tensor).nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        memory = torch.empty(total, dtype=torch.uint8, pin_memory=self.on_gpu)
        memory.numpy()[:: mmap.PAGESIZE] = 0
        self._copies = {key: _like(tensor, memory[places[key] :]) for key, tensor in tensors.items()}
        self.bytes = total

    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Begin to copy the values that the tensors have now. Returns the copies, and what to call before they are read.

        On a GPU the copies are queued behind the step before, and what comes later waits for them, so that the host waits for nothing.
        """
        for key, tensor in tensors.items():
            local_part(self._copies[key]).copy_(local_part(tensor), non_blocking=True)
        if not self.on_gpu:
            return self._copies, lambda: None
        event = torch.cuda.Event()
        event.record()
        return self._copies, event.synchronize


def _like(tensor: Tensor, space: Tensor) -> Tensor:
    """A tensor on the host with the same label, shape and dtype, whose local part lies at the beginning of `space`, uint8 [bytes]."""
    local = local_part(tensor)
    place = space[: local.nbytes].view(local.dtype).view(local.shape)
    # Not from_local, which would move the memory to the device of the mesh.
    return DTensor(place, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else place
