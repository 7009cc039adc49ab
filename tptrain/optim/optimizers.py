"""The optimizers over a stage's parameters, chosen by `optimizer.name`."""

from __future__ import annotations

import torch
from torch import nn

from tptrain.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, stage: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD. Matrices decay, norms and biases do not."""
    parameters = list(stage.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
