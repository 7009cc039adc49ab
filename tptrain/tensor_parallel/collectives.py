"""The conjugate pairs that tensor and sequence parallelism rest on.

    tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053)

    x ──copy──> column-parallel ──> gelu ──> row-parallel ──reduce──> y
       f: identity                                        f: all-reduce
       b: all-reduce                                      b: identity

    sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): x and y are split along the sequence

    x ──gather──> column-parallel ──> gelu ──> row-parallel ──reduce-scatter──> y
       f: all-gather                                        f: reduce-scatter
       b: reduce-scatter                                    b: all-gather

Each function's backward is the transpose of its forward as a map on the tensors of all ranks together, given how the result
is used: a gradient that is equal on all ranks needs no sum, one that each rank has a share of needs one.
The layers fuse these into their own autograd functions (`linear.py`); the functions here serve everything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.tensor_parallel.communication import all_reduce, split, start_all_gather, start_reduce_scatter

SEQUENCE = 1
"""The dimension of [b, s, h] that sequence parallelism splits."""


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Hand `x`, equal on all ranks, to layers that are split over `group`.

    Forward: identity. Backward: all-reduce (sum) of the gradient.
    """
    return x if group.size() == 1 else _Copy.apply(x, group)


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results `x`; the result is equal on all ranks.

    Forward: all-reduce (sum). Backward: identity.
    """
    return x if group.size() == 1 else _Reduce.apply(x, group)


def scatter_to_group(x: Tensor, group: dist.ProcessGroup, dim: int = -1) -> Tensor:
    """This rank's part of `x`, which is equal on all ranks. Sizes that do not divide are split as `shard_bounds` says.

    Forward: split. Backward: all-gather.
    """
    return x if group.size() == 1 else _Scatter.apply(x, group, dim)


def gather_from_group(x: Tensor, group: dist.ProcessGroup, dim: int = -1, size: int | None = None) -> Tensor:
    """The ranks' parts `x` side by side, for use that is the same on all ranks. size: of the whole, where parts differ.

    Forward: all-gather. Backward: split.
    """
    return x if group.size() == 1 else _Gather.apply(x, group, dim, size or x.shape[dim] * group.size(), False)


def scatter_to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's run of the sequence. x: [b, s, h], equal on all ranks -> [b, s/tp, h].

    Forward: split. Backward: all-gather.
    """
    return scatter_to_group(x, group, SEQUENCE)


def gather_from_sequence(x: Tensor, group: dist.ProcessGroup, into_split_layers: bool) -> Tensor:
    """The whole sequence. x: [b, s/tp, h] -> [b, s, h], equal on all ranks.

    Forward: all-gather. Backward: reduce-scatter where layers that are split over the group follow, as each rank then has a
    share of the gradient; split where what follows is the same on all ranks, as each rank then has all of it.
    """
    return x if group.size() == 1 else _Gather.apply(x, group, SEQUENCE, x.shape[SEQUENCE] * group.size(), into_split_layers)


def reduce_scatter_to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's run of the sequence of the sum of the ranks' partial results. x: [b, s, h] -> [b, s/tp, h].

    Forward: reduce-scatter. Backward: all-gather.
    """
    return x if group.size() == 1 else _ReduceScatter.apply(x, group, SEQUENCE)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.size = group, dim, x.shape[dim]
        return split(x, dim, group).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_all_gather(grad, ctx.dim, ctx.size, ctx.group).wait(), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int, size: int, into_split_layers: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.into_split_layers = group, dim, into_split_layers
        return start_all_gather(x, dim, size, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        mine = start_reduce_scatter(grad, ctx.dim, ctx.group).wait() if ctx.into_split_layers else split(grad, ctx.dim, ctx.group)
        return mine, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.size = group, dim, x.shape[dim]
        return start_reduce_scatter(x, dim, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_all_gather(grad, ctx.dim, ctx.size, ctx.group).wait(), None, None
