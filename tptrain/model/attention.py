"""Causal multi-head attention with the heads split over tp: q, k and v column-parallel, the output row-parallel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ModelConfig
from tptrain.tensor_parallel.collectives import copy_to_group
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d), causal) v for num_heads/tp heads on this rank. [b, s, h] -> [b, s, h].

    q, k and v are weights of their own, so that each one's tp shard is a plain run of whole heads.
    """

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        hidden = model.hidden_size
        self.head_size = hidden // model.num_heads
        self.q = ColumnParallelLinear(hidden, hidden, model.bias, tp, device)
        self.k = ColumnParallelLinear(hidden, hidden, model.bias, tp, device)
        self.v = ColumnParallelLinear(hidden, hidden, model.bias, tp, device)
        self.out = RowParallelLinear(hidden, hidden, model.bias, tp, device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h], equal on all tp ranks -> the same."""
        x = copy_to_group(x, self.q.group)  # once for all three: one all-reduce in backward
        q, k, v = (self.split_heads(layer.share(x)) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [b, heads/tp, s, d]
        return self.out(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """[b, s, heads/tp * d] -> [b, heads/tp, s, d]."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
