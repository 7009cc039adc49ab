"""The norms, with replicated, labelled parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ModelConfig
from tptrain.tensor_parallel.parameter import LabelledModule, labelled_parameter


class LayerNorm(LabelledModule):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension. [..., h] -> [..., h]."""

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device, sequence_parallel: bool) -> None:
        super().__init__()
        self.eps = model.norm_eps
        self.weight = labelled_parameter((model.hidden_size,), None, tp, device)
        self.bias = labelled_parameter((model.hidden_size,), None, tp, device) if model.bias else None
        if sequence_parallel:  # each rank sees its part of the sequence alone
            self.partial_gradients = ("weight", "bias") if model.bias else ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> the same."""
        return F.layer_norm(x, x.shape[-1:], self.part("weight"), self.bias_part(), self.eps)


class RMSNorm(LabelledModule):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019). [..., h] -> [..., h]."""

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device, sequence_parallel: bool) -> None:
        super().__init__()
        self.eps = model.norm_eps
        self.weight = labelled_parameter((model.hidden_size,), None, tp, device)
        if sequence_parallel:
            self.partial_gradients = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> the same."""
        return F.rms_norm(x, x.shape[-1:], self.part("weight"), self.eps)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
"""What `model.norm` may name."""
