"""What all ranks of a job do together around a measurement: wait for each other, and agree on a number."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Together:
    """All ranks of the job. They talk on the CPU, so that a GPU is left alone."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        self.world = world

    def wait(self) -> None:
        """Return once every rank is here."""
        self._agree(0.0, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        return self._agree(value, dist.ReduceOp.MAX)

    def smallest(self, value: float) -> float:
        """The smallest of the ranks' values."""
        return self._agree(value, dist.ReduceOp.MIN)

    def _agree(self, value: float, op: dist.ReduceOp.RedOpType) -> float:
        if self.world.size() == 1:
            return value
        token = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(token, op, group=self.world)
        return float(token)
