"""A rank's share of the model: several stages, what it puts off, and what it gives back."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tests.tensor_parallel.support import collectives
from tptrain.config import Config
from tptrain.data.dataset import Data
from tptrain.mesh import build_mesh
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from tptrain.trainer import Trainer


def trainer_of(config: Config) -> Trainer:
    tokens = skewed_tokens(2000, config.model.vocab_size)
    return Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, tokens))


def test_the_input_gradient_leaves_every_weight_of_a_linear_layer() -> None:
    """Else a schedule that splits the backward would compute right and gain nothing."""
    run_ranks(1, check_what_is_left)


def check_what_is_left(rank: int) -> None:
    trainer = trainer_of(small_config(parallel__schedule="zb_v", parallel__partition="even", model__tie_embeddings=False))
    share = trainer.share
    tokens = torch.arange(16).view(1, 16)
    x = share.stages[0](tokens).detach().requires_grad_()
    for number, output in ((0, share.stages[0](tokens)), (1, share.stages[1](x, tokens))):
        layers = [layer for layer in share.stages[number].modules() if isinstance(layer, (ColumnParallelLinear, RowParallelLinear))]
        with share.putting_off() as work:
            output.sum().backward()
        assert len(work) == len(layers) == 2 * 6 + number  # q, k, v, output, up, down in 2 layers each; the head
        assert all(layer.weight.grad is None for layer in layers)
        with torch.no_grad():
            for make in work:
                make()
        assert all(layer.weight.grad is not None for layer in layers)


@pytest.mark.parametrize("schedule", ["interleaved", "zb_v"])
def test_every_stage_gives_its_gathered_weights_back_after_an_evaluation(schedule: str) -> None:
    run_ranks(2, check_weights_are_given_back, schedule)


def check_weights_are_given_back(rank: int, schedule: str) -> None:
    trainer = trainer_of(small_config(parallel__dp=2, parallel__schedule=schedule))

    def held() -> dict[int, int]:
        stages = trainer.share.stages
        return {number: sum(parameter.to_local().numel() for parameter in stage.parameters()) for number, stage in stages.items()}

    before = held()
    trainer.evaluate()
    assert held() == before
    trainer.step()
    assert held() == before


@pytest.mark.parametrize("schedule", ["interleaved", "zb_v"])
def test_gradients_are_reduced_once_a_step(schedule: str) -> None:
    """However many micro-batches: one message a layer, and one for the rest of each stage."""
    run_ranks(2, check_reductions, schedule)


def check_reductions(rank: int, schedule: str) -> None:
    config = small_config(parallel__dp=2, parallel__schedule=schedule, parallel__micro_batch_size=1)
    trainer = trainer_of(config)
    for _ in range(2):
        with collectives() as counted:
            trainer.step()
        units = config.model.num_layers + len(trainer.share.stages)
        assert sum(count for name, count in counted.items() if "reduce_scatter" in name) == units
        assert sum(count for name, count in counted.items() if "allgather" in name) == units
