"""bf16 learns what fp32 learns, under every kind of layout; the weights stay fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config

STEPS = 20
LAYOUTS: list[dict[str, Any]] = [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"pp": 2, "schedule": "zb_v"}]
SGD = {"optimizer__name": "sgd", "optimizer__lr": 0.5, "optimizer__weight_decay": 0.0}


def train_all(rank: int, configs: list[Any]) -> list[dict[str, Any]]:
    """Train each config; its losses, and the dtypes of its weights and of what the first layer computes."""
    from tptrain.data.dataset import Data
    from tptrain.mesh import build_mesh
    from tptrain.trainer import Trainer

    results = []
    for config in configs:
        tokens = skewed_tokens(4000, config.model.vocab_size)
        trainer = Trainer(
            config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, tokens[:3000], tokens[3000:])
        )
        seen: set[str] = set()
        block = next(iter(next(iter(trainer.share.stages.values())).layers.values()))
        block.register_forward_hook(lambda module, inputs, output, seen=seen: seen.add(str(output.dtype)))
        losses = [trainer.step().loss for _ in range(STEPS)]
        weights = {str(p.dtype) for p in trainer.share.modules.parameters()}
        results.append({"loss": losses, "val_loss": trainer.evaluate()["val_loss"], "weights": weights, "computed": seen})
    return results


@pytest.mark.parametrize("optimizer", [{}, SGD], ids=["adamw", "sgd"])
def test_bf16_follows_fp32_under_every_layout(optimizer: dict[str, Any]) -> None:
    """Losses within 1 % of fp32's at each step: a weight that stays behind, or a gradient scaled wrong, is far outside."""
    expected = run_ranks(1, train_all, [small_config(**optimizer)])[0][0]
    assert expected["loss"][-1] < 0.95 * expected["loss"][0]
    for world in (1, 2):
        layouts = [{f"parallel__{k}": v for k, v in layout.items()} for layout in LAYOUTS if bool(layout) == (world == 2)]
        configs = [small_config(train__precision="bf16", **optimizer, **layout) for layout in layouts]
        for rank in run_ranks(world, train_all, configs):
            for result, layout in zip(rank, layouts, strict=True):
                assert result["loss"] == pytest.approx(expected["loss"], rel=1e-2), layout
                assert result["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-2), layout
                assert result["loss"] != pytest.approx(expected["loss"], rel=1e-6), "this is no bf16"
                assert result["weights"] == {"torch.float32"}, layout
                assert result["computed"] == {"torch.bfloat16"}, layout
