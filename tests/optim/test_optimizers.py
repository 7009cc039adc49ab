"""The optimizers against their formulas, written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.support import small_config
from tests.tensor_parallel.support import random
from tptrain.config import OptimizerConfig
from tptrain.optim.optimizers import build_optimizer, set_lr

CONFIG = OptimizerConfig(name="adamw", lr=0.01, betas=[0.9, 0.95], eps=1e-6, weight_decay=0.1, grad_clip=None)


def toy_stage() -> nn.Module:
    """Two matrices, a bias, a norm's weight and bias."""
    stage = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    for seed, parameter in enumerate(stage.parameters()):
        parameter.data = random(*parameter.shape, seed=seed)
    return stage


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_matrices_decay_and_nothing_else(name: str) -> None:
    stage = toy_stage()
    optimizer = build_optimizer(replace(CONFIG, name=name), stage)
    names = {id(parameter): key for key, parameter in stage.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {"0.weight": 0.1, "1.weight": 0.1, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


def test_adamw_is_the_paper_s() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, with a decay that the learning rate scales."""
    stage = toy_stage()
    optimizer = build_optimizer(CONFIG, stage)
    values = [parameter.detach().double() for parameter in stage.parameters()]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    for step in range(1, 5):
        lr = 0.01 / step
        set_lr(optimizer, lr)
        for i, parameter in enumerate(stage.parameters()):
            gradient = random(*parameter.shape, seed=100 * step + i)
            parameter.grad = gradient.clone()
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient**2
            decay = 0.1 if parameter.ndim == 2 else 0.0
            update = (first[i] / (1 - 0.9**step)) / ((second[i] / (1 - 0.95**step)).sqrt() + 1e-6)
            values[i] = values[i] - lr * decay * values[i] - lr * update
        optimizer.step()
        for parameter, value in zip(stage.parameters(), values, strict=True):
            assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum: float) -> None:
    stage = toy_stage()
    optimizer = build_optimizer(replace(CONFIG, name="sgd", momentum=momentum), stage)
    values = [parameter.detach().clone() for parameter in stage.parameters()]
    speeds: list[torch.Tensor] = [torch.zeros_like(value) for value in values]
    for step in range(3):
        for i, parameter in enumerate(stage.parameters()):
            parameter.grad = random(*parameter.shape, seed=100 * step + i)
            decay = 0.1 if parameter.ndim == 2 else 0.0
            speeds[i] = momentum * speeds[i] + parameter.grad + decay * values[i]
            values[i] = values[i] - 0.01 * speeds[i]
        optimizer.step()
    for parameter, value in zip(stage.parameters(), values, strict=True):
        assert_close(parameter.detach(), value)


def test_the_shipped_config_builds() -> None:
    assert isinstance(build_optimizer(small_config().optimizer, toy_stage()), torch.optim.AdamW)
