"""Causal multi-head attention with the heads split over tp: q, k and v column-parallel, the output row-parallel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ModelConfig
from tptrain.model.documents import Apart, Runs, attend
from tptrain.model.recompute import remade
from tptrain.model.rotary import Rotation, rotate
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, SharedColumnLinear, fan_out
from tptrain.tensor_parallel.random import Stream, dropout_heads


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d), causal) v for num_heads/tp heads on this rank. [b, s, h] -> [b, s, h].

    q, k and v are weights of their own, so that each one's tp shard is a plain run of whole heads. With fewer key/value heads than
    query heads (Ainslie et al. 2023, arXiv:2305.13245) each serves a run of query heads; with fewer than tp has ranks,
    several ranks compute the same one (`SharedColumnLinear`).
    """

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device, sequence_parallel: bool, recompute: bool) -> None:
        super().__init__()
        hidden, kv_size = model.hidden_size, model.kv_heads * model.head_size
        self.head_size, self.dropout, self.recompute = model.head_size, model.dropout, recompute
        self.first_head = tp.get_local_rank() * model.num_heads // tp.size()
        self.q = ColumnParallelLinear(hidden, hidden, model.bias, tp, device, sequence_parallel=sequence_parallel)
        self.k, self.v = (
            ColumnParallelLinear(hidden, kv_size, model.bias, tp, device, sequence_parallel=sequence_parallel)
            if model.kv_heads % tp.size() == 0
            else SharedColumnLinear(hidden, kv_size, model.kv_heads, model.bias, tp, device, sequence_parallel=sequence_parallel)
            for _ in "kv"
        )
        self.out = RowParallelLinear(hidden, hidden, model.bias, tp, device, sequence_parallel=sequence_parallel)

    def forward(self, x: Tensor, turn: Rotation | None = None, stream: Stream | None = None, apart: Apart | None = None) -> Tensor:
        """x: [b, s, h], equal on all tp ranks -> the same; under sequence parallelism [b, s/tp, h], this rank's part.

        turn: what rotary positions turn q and k by. stream: of this place, in training. apart: of the documents, which then attend
        to themselves alone; with dropout a mask.
        """
        q, k, v = (self.split_heads(y) for y in fan_out(x, [self.q, self.k, self.v]))
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if self.dropout and stream is not None:
            assert not isinstance(apart, Runs), "dropout has the weights as a matrix"
            dropping = self.attend_with_dropout
            y = remade(dropping, q, k, v, stream, apart) if self.recompute else dropping(q, k, v, stream, apart)
        else:
            y = attend(q, k, v, apart)
        return self.out(y.transpose(1, 2).flatten(2))  # [b, heads/tp, s, d] -> [b, s, h/tp]

    def attend_with_dropout(self, q: Tensor, k: Tensor, v: Tensor, stream: Stream, mask: Tensor | None) -> Tensor:
        """Attention whose weights exist as a matrix [b, heads/tp, s, s], as the masks belong to heads and not to a kernel."""
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_size)
        if mask is None:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        else:
            scores = scores + mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        return dropout_heads(weights, self.dropout, stream, self.first_head) @ v

    def split_heads(self, x: Tensor) -> Tensor:
        """[b, s, heads/tp * d] -> [b, heads/tp, s, d]."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
