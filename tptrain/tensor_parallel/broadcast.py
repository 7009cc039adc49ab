"""Batches from a tp group's first rank to the others, so that only one rank of a group reads the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from tptrain.tensor_parallel.communication import in_one_buffer


def broadcast_from_first(batch: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Fill the tensors of `batch` with those of the group's first rank, in place; shapes and dtypes are the same on all ranks.

    One flat message a dtype. Not differentiable.
    """
    if group.size() > 1:
        in_one_buffer(batch, lambda flat: dist.broadcast(flat, group_src=0, group=group))
