"""Linear layers and an embedding, split over a tp group.

    ColumnParallelLinear   weight [out, in] split over rows:    each rank makes out/tp of the outputs
    SharedColumnLinear     weight [out, in] whole everywhere:   each rank makes the outputs that it needs
    RowParallelLinear      weight [out, in] split over columns: each rank sums in/tp of the inputs
    VocabParallelEmbedding weight [vocab, h] split over rows:   each rank knows vocab/tp of the tokens

Column then row needs one all-reduce forward (after the row layer) and one backward (before the column layer). With
`sequence_parallel` each is an all-gather and a reduce-scatter instead, and what lies between row and column is split
along the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tptrain.tensor_parallel.collectives import (
    SEQUENCE,
    gather_from_group,
    reduce_from_group,
    reduce_scatter_to_sequence,
    scatter_to_group,
)
from tptrain.tensor_parallel.communication import shard_bounds
from tptrain.tensor_parallel.linear import Operand, column_linears, row_linear
from tptrain.tensor_parallel.parameter import LabelledModule, existing_gradient, labelled_parameter
from tptrain.tensor_parallel.scratch import Scratch


class ColumnParallelLinear(LabelledModule):
    """y = x W^T + b with the outputs split over tp. x: [..., in], equal on all ranks -> y: [..., out/tp].

    gather_output: y is whole, [..., out], on every rank. sequence_parallel: x is [b, s/tp, in], this rank's part. gather_dim: see
    `column_linears`.
    Forward: no communication; all-gather with sequence_parallel; all-gather of y with gather_output. Backward: all-reduce of
    x's gradient; all-gather and reduce-scatter with sequence_parallel.
    """

    rows: slice | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        tp: DeviceMesh,
        device: torch.device,
        *,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        gather_dim: int = SEQUENCE,
    ) -> None:
        super().__init__()
        self.group, self.out_features = tp.get_group(), out_features
        self.gather_output, self.sequence_parallel, self.gather_dim = gather_output, sequence_parallel, gather_dim
        self.row_start, _ = shard_bounds(out_features, tp.size(), tp.get_local_rank())
        self.make_parameters(in_features, out_features, bias, 0, tp, device)

    def make_parameters(self, inputs: int, outputs: int, bias: bool, dim: int | None, tp: DeviceMesh, device: torch.device) -> None:
        """Make weight and bias, split along `dim` of the outputs or replicated (None)."""
        self.weight = labelled_parameter((outputs, inputs), dim, tp, device)
        self.bias = labelled_parameter((outputs,), dim, tp, device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out/tp], or [..., out] with gather_output."""
        return fan_out(x, [self])[0]

    def operand(self) -> Operand:
        """This layer as `linear.py` computes with it."""
        return _operand(self, self.rows)


class SharedColumnLinear(ColumnParallelLinear):
    """A column layer with fewer blocks of outputs (key/value heads) than tp has ranks: several ranks make the same block.

    The weight is replicated, as each of its blocks has to be on several ranks, and each rank computes with its block's rows alone.
    Its gradient from there is a part: what this rank's use of the block gives.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        bias: bool,
        tp: DeviceMesh,
        device: torch.device,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        if tp.size() % blocks:
            raise ValueError(f"{blocks} blocks of outputs do not divide tp={tp.size()}")
        super().__init__(in_features, out_features, bias, tp, device, sequence_parallel=sequence_parallel)
        size, block = out_features // blocks, tp.get_local_rank() * blocks // tp.size()
        self.row_start = block * size
        self.rows = slice(block * size, (block + 1) * size)
        self.partial_gradients = ("weight", "bias") if bias else ("weight",)

    def make_parameters(self, inputs: int, outputs: int, bias: bool, dim: int | None, tp: DeviceMesh, device: torch.device) -> None:
        """Make them replicated."""
        super().make_parameters(inputs, outputs, bias, None, tp, device)


def fan_out(x: Tensor, layers: Sequence[ColumnParallelLinear]) -> list[Tensor]:
    """The outputs of several column layers for one input: one collective in each direction serves them all."""
    first = layers[0]
    outputs = column_linears(x, [layer.operand() for layer in layers], first.group, first.sequence_parallel, first.gather_dim)
    return [
        gather_from_group(y, layer.group, -1, layer.out_features) if layer.gather_output else y
        for y, layer in zip(outputs, layers, strict=True)
    ]  # fmt: skip


class RowParallelLinear(LabelledModule):
    """y = x W^T + b with the inputs split over tp. x: [..., in/tp] -> y: [..., out], equal on all ranks.

    input_is_parallel=False: x is [..., in], whole on every rank, and split here. sequence_parallel: y is [b, s/tp, out].
    Forward: all-reduce of the partial products, or a reduce-scatter. Backward: no communication, or an all-gather. The bias is
    replicated and is added once, after the sum, on every rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        tp: DeviceMesh,
        device: torch.device,
        *,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        gather_dim: int = SEQUENCE,
    ) -> None:
        super().__init__()
        if sequence_parallel and not input_is_parallel:
            raise ValueError("sequence_parallel needs input_is_parallel: the whole of x is on no rank")
        self.group, self.input_is_parallel = tp.get_group(), input_is_parallel
        self.sequence_parallel, self.gather_dim = sequence_parallel, gather_dim
        self.weight = labelled_parameter((out_features, in_features), 1, tp, device)
        self.bias = labelled_parameter((out_features,), None, tp, device) if bias else None
        if sequence_parallel and bias:
            self.partial_gradients = ("bias",)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in/tp], or [..., in] without input_is_parallel -> [..., out]."""
        if not self.input_is_parallel:
            x = scatter_to_group(x, self.group)
        return row_linear(x, _operand(self), self.group, self.sequence_parallel, self.gather_dim)


class VocabParallelEmbedding(LabelledModule):
    """Rows of a table that is split over the vocabulary. tokens: [b, s] int64 -> [b, s, h], equal on all ranks.

    Forward: each rank looks up the tokens it owns, zeros elsewhere, then all-reduce; with sequence_parallel a reduce-scatter, to
    [b, s/tp, h]. Backward: no communication, or an all-gather.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: DeviceMesh, device: torch.device, *, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.group, self.sequence_parallel = tp.get_group(), sequence_parallel
        self.start, self.stop = shard_bounds(vocab_size, tp.size(), tp.get_local_rank())
        self.weight = labelled_parameter((vocab_size, hidden_size), 0, tp, device)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [b, s] int64 -> [b, s, h]."""
        elsewhere = None  # with one rank a token outside the table is an error
        if self.group.size() > 1:
            elsewhere = ((tokens < self.start) | (tokens >= self.stop)).unsqueeze(-1)
            tokens = (tokens - self.start).clamp(0, max(0, self.stop - self.start - 1))
        rows = look_up(self.weight, self.values("weight"), tokens, elsewhere)
        return (reduce_scatter_to_sequence if self.sequence_parallel else reduce_from_group)(rows, self.group)


def look_up(parameter: Tensor, values: Tensor, indices: Tensor, elsewhere: Tensor | None = None) -> Tensor:
    """Rows of this rank's part of a table, [b, s] int64 -> [b, s, h]; zeros where `elsewhere`, bool [b, s, 1].

    values: of the part, in the dtype to compute in. Forward: no communication. Backward: adds to `parameter`'s gradient; none.
    """
    rows: Tensor = _LookUp.apply(parameter, values, indices, elsewhere)
    return rows


class _LookUp(torch.autograd.Function):
    """Rows of this rank's part of a table, zeros for tokens that live elsewhere.

    Forward: [b, s] indices into the part, [b, s, 1] bool -> [b, s, h]. Backward: adds to the rows' gradients.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor, indices: Tensor, elsewhere: Tensor | None) -> Tensor:
        ctx.parameter, ctx.indices, ctx.elsewhere = parameter, indices, elsewhere
        if not values.shape[0]:  # more ranks than blocks of rows: this one owns none
            return values.new_zeros(*indices.shape, values.shape[1])
        rows = F.embedding(indices, values)
        return rows if elsewhere is None else rows.masked_fill_(elsewhere, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        total = existing_gradient(ctx.parameter)
        if total.shape[0]:
            grad = grad if ctx.elsewhere is None else grad.masked_fill(ctx.elsewhere, 0)
            total.index_put_((ctx.indices,), grad.to(total.dtype), accumulate=True)
        return None, None, None, None


def head_of(layer: ColumnParallelLinear | VocabParallelEmbedding, scratch: Scratch | None = None) -> Operand:
    """The layer that makes logits: a column layer, or an embedding used as one, [vocab/tp, h] either way. No bias."""
    return Operand(layer.weight, layer.values("weight"), None, None, None, layer.deferral, scratch)


def _operand(layer: ColumnParallelLinear | RowParallelLinear, rows: slice | None = None) -> Operand:
    weight, bias = layer.values("weight"), None if layer.bias is None else layer.values("bias")
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return Operand(layer.weight, weight, layer.bias, bias, rows, layer.deferral)
