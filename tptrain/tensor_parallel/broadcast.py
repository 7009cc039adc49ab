"""Batches from a tp group's first rank to the others, so that only one rank of a group reads the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_from_first(batch: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Fill the tensors of `batch` with those of the group's first rank, in place; shapes and dtypes are the same on all ranks.

    One flat message a dtype. Not differentiable.
    """
    if group.size() == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in batch}, key=str):
        mine = [tensor for tensor in batch if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in mine])
        dist.broadcast(flat, group_src=0, group=group)
        for tensor, received in zip(mine, flat.split([tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(received.view_as(tensor))
