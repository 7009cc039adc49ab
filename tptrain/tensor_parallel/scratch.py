"""Memory for tensors as large as logits, kept and used again: on a CPU it takes longer to get than to fill."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


class Scratch:
    """Tensors that nobody reads any more."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of a shape, of the dtype and on the device of `like`, with any content. It is no view, whatever it was before."""
        size = math.prod(shape)
        for place, tensor in enumerate(self._free):
            if tensor.numel() == size and tensor.dtype == like.dtype:
                del self._free[place]
                view = tensor.view(tuple(shape))
                return like.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())
        self._free.clear()  # of another batch
        return like.new_empty(shape)

    def give_back(self, tensor: Tensor) -> None:
        """Take back what `take` gave, or any other tensor that is nobody else's."""
        if tensor.is_contiguous():
            self._free.append(tensor)
