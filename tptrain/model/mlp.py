"""The block's MLP: column-parallel up (and gate), the activation, row-parallel down."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ModelConfig
from tptrain.model.recompute import forgetting
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, fan_out


def gelu(up: Tensor) -> Tensor:
    """GPT-2's tanh form."""
    return F.gelu(up, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up; silu(gate), which autograd would keep as well, is cheap to make again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class MLP(nn.Module):
    """down(activation(up(x))) with ffn_hidden_size/tp inner units on this rank. [b, s, h] -> [b, s, h].

    An MLP treats each token alone, so under sequence parallelism the ranks' parts are put together in any order: in that of the
    ranks (gather_dim=0), where they lie end to end in memory.

    activation: gelu of up, or with swiglu also of a gate. recompute: keep only what goes into it, see `recompute.py`.
    """

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device, sequence_parallel: bool, recompute: bool) -> None:
        super().__init__()
        self.activation = swiglu if model.activation == "swiglu" else gelu
        self.recompute = recompute

        def column() -> ColumnParallelLinear:
            return ColumnParallelLinear(
                model.hidden_size, model.ffn_hidden_size, model.bias, tp, device, sequence_parallel=sequence_parallel, gather_dim=0
            )  # fmt: skip

        if model.activation == "swiglu":
            self.gate = column()
        self.up = column()
        self.down = RowParallelLinear(
            model.ffn_hidden_size, model.hidden_size, model.bias, tp, device, sequence_parallel=sequence_parallel, gather_dim=0
        )  # fmt: skip

    @property
    def columns(self) -> list[ColumnParallelLinear]:
        """The layers that share the input, in the order of the activation's arguments."""
        return [self.gate, self.up] if self.activation is swiglu else [self.up]

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h], equal on all tp ranks -> the same; under sequence parallelism [b, s/tp, h], this rank's part."""
        inner = fan_out(x, self.columns)
        activated = self.activation(*inner)
        kept = [tensor.detach() for tensor in inner]
        with forgetting(activated, lambda: self.activation(*kept), self.recompute):
            return self.down(activated)
