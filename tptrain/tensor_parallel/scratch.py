"""Memory for tensors as large as logits, kept and used again: on a CPU it takes longer to get than to fill."""

from __future__ import annotations

from torch import Tensor


class Scratch:
    """Matrices that nobody reads any more."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A matrix [rows, columns] of the dtype and on the device of `like`, with any content."""
        for place, matrix in enumerate(self._free):
            if matrix.shape == (rows, columns) and matrix.dtype == like.dtype:
                return self._free.pop(place)
        self._free.clear()  # of another batch
        return like.new_empty(rows, columns)

    def give_back(self, matrix: Tensor) -> None:
        """Take back what `take` gave, or any other matrix that is nobody else's."""
        if matrix.is_contiguous():
            self._free.append(matrix)
