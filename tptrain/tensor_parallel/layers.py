"""Linear layers and an embedding, split over a tp group.

    ColumnParallelLinear   weight [out, in] split over rows:    each rank makes out/tp of the outputs
    RowParallelLinear      weight [out, in] split over columns: each rank sums in/tp of the inputs
    VocabParallelEmbedding weight [vocab, h] split over rows:   each rank knows vocab/tp of the tokens

Column then row needs one all-reduce forward (after the row layer) and one backward (before the column layer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tptrain.tensor_parallel.collectives import copy_to_group, reduce_from_group
from tptrain.tensor_parallel.parameter import LabelledModule, labelled_parameter, shard_bounds


class ColumnParallelLinear(LabelledModule):
    """y = x W^T + b with the outputs split over tp. x: [..., in], equal on all ranks -> y: [..., out/tp].

    Forward: no communication. Backward: all-reduce of x's gradient.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.group = tp.get_group()
        self.row_start, _ = shard_bounds(out_features, tp.size(), tp.get_local_rank())
        self.weight = labelled_parameter((out_features, in_features), 0, tp, device)
        self.bias = labelled_parameter((out_features,), 0, tp, device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out/tp]."""
        return self.share(copy_to_group(x, self.group))

    def share(self, x: Tensor) -> Tensor:
        """This rank's outputs for an x that `copy_to_group` already handed over: several layers may share one x."""
        return F.linear(x, self.part("weight"), self.bias_part())


class RowParallelLinear(LabelledModule):
    """y = x W^T + b with the inputs split over tp. x: [..., in/tp] -> y: [..., out], equal on all ranks.

    Forward: all-reduce of the partial products. Backward: no communication. The bias is replicated and is added once,
    after the sum, on every rank.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.group = tp.get_group()
        self.weight = labelled_parameter((out_features, in_features), 1, tp, device)
        self.bias = labelled_parameter((out_features,), None, tp, device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in/tp] -> [..., out]."""
        y = reduce_from_group(F.linear(x, self.part("weight")), self.group)
        bias = self.bias_part()
        return y if bias is None else y + bias


class VocabParallelEmbedding(LabelledModule):
    """Rows of a table that is split over the vocabulary. tokens: [...] int64 -> [..., h], equal on all ranks.

    Forward: each rank looks up the tokens it owns, zeros elsewhere, then all-reduce. Backward: no communication.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.group = tp.get_group()
        self.start, self.stop = shard_bounds(vocab_size, tp.size(), tp.get_local_rank())
        self.weight = labelled_parameter((vocab_size, hidden_size), 0, tp, device)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [...] int64 -> [..., h]."""
        weight = self.part("weight")
        if self.group.size() == 1:
            return F.embedding(tokens, weight)
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        if self.start == self.stop:  # more ranks than blocks of rows: this one owns none
            mine = weight.sum() * torch.zeros(*tokens.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
        else:
            rows = F.embedding((tokens - self.start).masked_fill(elsewhere, 0), weight)
            mine = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        return reduce_from_group(mine, self.group)
