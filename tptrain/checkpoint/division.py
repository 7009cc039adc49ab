"""Who writes which tensors of a checkpoint: each part of a tensor once, and all ranks about as many bytes.

Ranks that hold the same part (replicas over tp or dp) deal such parts out among them, as `torch.distributed.checkpoint` does at each save.
Here it is done before there is one, so that a rank copies aside only what it will write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from tptrain.tensor_parallel.parameter import local_part

_Layout = dict[str, tuple[torch.dtype, torch.Size, torch.Size]]


@dataclass(frozen=True)
class Division:
    """A rank's part of the writing."""

    keys: frozenset[str]
    """Tensors of which this rank writes its part."""
    total_bytes: int
    """Of all tensors, over all ranks."""
    layout: _Layout
    """Of all tensors that this rank has: dtype, shape, shape of its part."""

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that this rank writes."""
        return {key: tensor for key, tensor in tensors.items() if key in self.keys}

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether this rank has the same tensors as when it was made, of any values."""
        return _layout(tensors) == self.layout


def divide(tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> Division:
    """Agree with the other ranks of a gloo group, all of which call this."""
    size, first = group.size(), dist.get_rank(group) == 0
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=first)
    plans: list[Any] = [None] * size
    dist.gather_object(planner.create_local_plan(), plans if first else None, group=group, group_dst=0)
    shares: list[Any] = [None] * size
    if first:
        plans, _ = planner.create_global_plan(plans)
        total = sum(_bytes(item) for plan in plans for item in plan.items)
        shares = [(frozenset(item.index.fqn for item in plan.items), total) for plan in plans]
    own: list[Any] = [None]
    dist.scatter_object_list(own, shares if first else None, group=group, group_src=0)
    keys, total_bytes = own[0]
    return Division(keys, total_bytes, _layout(tensors))


def _bytes(item: WriteItem) -> int:
    """Of the part of a tensor that an item is about."""
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    return {key: (tensor.dtype, tensor.shape, local_part(tensor).shape) for key, tensor in tensors.items()}
