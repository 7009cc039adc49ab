"""The arithmetic of split linear layers, with their communication hidden under it.

Backward of column-parallel layers that share an input, with sequence parallelism (without it: an all-reduce, and no gather):

    communication    all-gather x ······ ┐      reduce-scatter x's gradient ······ ┐
    computation      x's gradient ·······┴────> weight gradients ··················┴───>

The layers of one input (q, k and v; gate and up) are one autograd function: their input gradients are summed here
first, and one collective serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tptrain.tensor_parallel.collectives import SEQUENCE
from tptrain.tensor_parallel.communication import (
    Pending,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from tptrain.tensor_parallel.deferral import Deferral
from tptrain.tensor_parallel.parameter import add_gradient, add_product
from tptrain.tensor_parallel.scratch import Scratch


@dataclass(frozen=True)
class Operand:
    """One linear layer as the functions here see it: parameters to add gradients to, and the plain values to compute with."""

    weight: Tensor
    weight_values: Tensor
    """[out, in] of this rank."""
    bias: Tensor | None
    bias_values: Tensor | None
    rows: slice | None = None
    """The rows of the weight's local part that `weight_values` are, where not all."""
    deferral: Deferral | None = None
    """Who decides when the gradients of weight and bias are made; None: at once."""
    scratch: Scratch | None = None
    """Where the output's memory comes from, and goes to with the output's gradient, which lies in it or is this layer's alone."""


def column_linears(
    x: Tensor, operands: Sequence[Operand], group: dist.ProcessGroup, sequence_parallel: bool, gather_dim: int = SEQUENCE
) -> tuple[Tensor, ...]:
    """y_i = x W_i^T + b_i for layers whose outputs are split over `group`.

    x: [..., in], equal on all ranks; under sequence parallelism this rank's [b, s/tp, in]. Returns [..., out_i/tp] each.
    gather_dim: where the ranks' parts of the sequence are put side by side: 1 gives [b, s, ...]; 0 gives [tp * b, s/tp, ...] and copies
    nothing, for layers to which the order of tokens means nothing.
    Forward: no communication; sequence parallelism: one all-gather. Backward: one all-reduce of x's gradient, or a second
    all-gather of x (rather than keeping it) and a reduce-scatter of its gradient; both run under matrix products.
    """
    dim = gather_dim if sequence_parallel and group.size() > 1 else None
    return _ColumnLinears.apply(x, operands, group, dim, *_parameters(operands))


def row_linear(x: Tensor, operand: Operand, group: dist.ProcessGroup, sequence_parallel: bool, gather_dim: int = SEQUENCE) -> Tensor:
    """y = sum over ranks of (x W^T) + b, for a layer whose inputs are split over `group`. x: [..., in/tp] -> [..., out].

    gather_dim: as the column layers before had it.

    Forward: all-reduce, or under sequence parallelism a reduce-scatter to [b, s/tp, out]; then the bias, once. Backward: no
    communication, or an all-gather of y's gradient.
    """
    partial = _RowProduct.apply(x, operand, operand.weight)
    return _RowSum.apply(partial, operand, group, gather_dim if sequence_parallel and group.size() > 1 else None, operand.bias)


def _parameters(operands: Sequence[Operand]) -> list[Tensor]:
    """What autograd has to see, so that it comes back here even where x needs no gradient."""
    return [operand.weight for operand in operands] + [operand.bias for operand in operands if operand.bias is not None]


class _ColumnLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operands: Sequence[Operand], group: dist.ProcessGroup, dim: int | None, *_: Tensor) -> Any:
        ctx.operands, ctx.group, ctx.dim = operands, group, dim
        ctx.save_for_backward(x)
        if dim is not None:
            x = _start_gather(x, dim, group).wait()
        return tuple(_product(x, operand) for operand in operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gathering = _start_gather(x, ctx.dim, ctx.group) if ctx.dim is not None else None
        matrices = [_matrix(grad) for grad in grads]
        pending: Pending | None = None
        if ctx.needs_input_grad[0]:
            x_grad = matrices[0] @ ctx.operands[0].weight_values
            for matrix, operand in zip(matrices[1:], ctx.operands[1:], strict=True):
                x_grad.addmm_(matrix, operand.weight_values)
            x_grad = x_grad.view(*grads[0].shape[:-1], x_grad.shape[-1])
            pending = _start_sum(x_grad, ctx.dim, ctx.group)
        x_matrix = _matrix(gathering.wait() if gathering else x)
        for matrix, operand in zip(matrices, ctx.operands, strict=True):
            _add_gradients(operand, matrix, x_matrix)
        return pending.wait() if pending else None, *(None for _ in ctx.needs_input_grad[1:])  # parameters' are added by hand


class _RowProduct(torch.autograd.Function):
    """The partial product alone: recomputation that has x again stops here, before the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operand: Operand, _: Tensor) -> Tensor:
        ctx.operand = operand
        ctx.save_for_backward(x)
        return F.linear(x, operand.weight_values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), operand, matrix = ctx.saved_tensors, ctx.operand, _matrix(grad)
        x_grad = (matrix @ operand.weight_values).view(x.shape) if ctx.needs_input_grad[0] else None
        _add_gradients(operand, matrix, _matrix(x), bias=False)
        return x_grad, None, None


class _RowSum(torch.autograd.Function):
    """The sum over ranks, then the bias."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, operand: Operand, group: dist.ProcessGroup, dim: int | None, _: Tensor | None) -> Tensor:
        ctx.operand, ctx.group, ctx.dim = operand, group, dim
        y = _start_sum(partial, dim, group).wait()
        if y is partial:
            ctx.mark_dirty(partial)
        return y if operand.bias_values is None else y.add_(operand.bias_values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathering = _start_gather(grad, ctx.dim, ctx.group) if ctx.dim is not None else None
        if ctx.operand.bias is not None:  # of this rank's part of the sequence, if that is split
            add_gradient(ctx.operand.bias, _matrix(grad).sum(0))
        return gathering.wait() if gathering else grad, None, None, None, None


def _product(x: Tensor, operand: Operand) -> Tensor:
    """x W^T + b."""
    if operand.scratch is None:
        return F.linear(x, operand.weight_values, operand.bias_values)
    y = operand.scratch.take((*x.shape[:-1], len(operand.weight_values)), x)
    torch.mm(_matrix(x), operand.weight_values.t(), out=_matrix(y))
    return y if operand.bias_values is None else y.add_(operand.bias_values)


def _add_gradients(operand: Operand, y_grad: Tensor, x: Tensor, bias: bool = True) -> None:
    """Add the gradients of weight and bias, now or later. y_grad: [n, out], x: [n, in]."""

    def make() -> None:
        add_product(operand.weight, y_grad, x, operand.rows)
        if bias and operand.bias is not None:
            add_gradient(operand.bias, y_grad.sum(0), operand.rows)
        if operand.scratch is not None:
            operand.scratch.give_back(y_grad)

    if operand.deferral is None:
        make()
    else:
        operand.deferral.do(make)


def _start_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Pending:
    return start_all_gather(x, dim, x.shape[dim] * group.size(), group)


def _start_sum(x: Tensor, dim: int | None, group: dist.ProcessGroup) -> Pending:
    """The sum of the ranks' `x`, given away: each one's part along `dim`, or with None all of it on all ranks."""
    if group.size() == 1:
        return Pending("sum", [], group, lambda: x)
    return start_all_reduce(x, group) if dim is None else start_reduce_scatter(x, dim, group)


def _matrix(x: Tensor) -> Tensor:
    """[..., h] -> [n, h]."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
