"""The block's MLP: column-parallel up, GELU, row-parallel down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ModelConfig
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(gelu(up(x))) with ffn_hidden_size/tp inner units on this rank. [b, s, h] -> [b, s, h]."""

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(model.hidden_size, model.ffn_hidden_size, model.bias, tp, device)
        self.down = RowParallelLinear(model.ffn_hidden_size, model.hidden_size, model.bias, tp, device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h], equal on all tp ranks -> the same."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))
