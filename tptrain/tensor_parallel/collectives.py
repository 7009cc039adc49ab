"""The two conjugate operations that tensor parallelism rests on (Shoeybi et al. 2019, arXiv:1909.08053).

    x ──copy──> column-parallel ──> gelu ──> row-parallel ──reduce──> y
       f: identity                                        f: all-reduce
       b: all-reduce                                      b: identity

A layer between the two sees the whole input and makes a share of the output; `copy_to_group` sums the shares'
input gradients, `reduce_from_group` sums the shares themselves. Either one done in both directions would
multiply gradients by the group's size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over `group`, in a tensor of its own; `x` may have any strides. Not differentiable."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
