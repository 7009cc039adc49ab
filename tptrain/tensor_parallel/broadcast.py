"""Batches from a tp group's first rank to the others, so that only one rank of a group reads the data."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def broadcast_from_first(batch: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`batch` of the group's first rank, on every rank. The others pass a tensor of the same shape and dtype to fill.

    One broadcast. Not differentiable.
    """
    if group.size() > 1:
        dist.broadcast(batch, group_src=0, group=group)
    return batch
