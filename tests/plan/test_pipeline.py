"""The plan of a config's pipeline: its layers, its parameters and what its steps cost, by formula."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from tests.support import small_config
from tptrain.config import Config
from tptrain.model.flops import flops_per_token, num_parameters
from tptrain.plan.pipeline import describe, stage_costs, stage_layers


def pipelined(**changes: Any) -> Config:
    """Eight layers whose head costs little, on four ranks."""
    return small_config(**{"model__num_layers": 8, "parallel__pp": 4, "train__global_batch_size": 16} | changes)


def layers(config: Config) -> list[tuple[int, int]]:
    return [(stage.first_layer, stage.last_layer) for stage in describe(config).stages]


def block_and_head(config: Config) -> tuple[int, int]:
    """FLOPs of a forward, from two models that differ in one layer: what a layer adds, and what is left without any."""
    model, seq_len = config.model, config.data.seq_len
    whole = flops_per_token(model, seq_len) / 3
    model.num_layers -= 1
    block = whole - flops_per_token(model, seq_len) / 3
    model.num_layers += 1
    return int(block), int(whole - model.num_layers * block)


def test_stages_hold_the_whole_model_once() -> None:
    for tied in (True, False):
        config = pipelined(model__tie_embeddings=tied)
        stages, model = describe(config).stages, config.model
        assert [stage.rank for stage in stages] == [0, 1, 2, 3]
        copy = model.vocab_size * model.hidden_size if tied else 0
        assert sum(stage.parameters for stage in stages) == num_parameters(model) + copy
        assert sum(stage.forward_flops_per_token for stage in stages) == flops_per_token(model, config.data.seq_len) / 3


def test_a_large_vocabulary_leaves_the_last_stage_fewer_layers() -> None:
    config = pipelined(model__vocab_size=2000)
    block, head = block_and_head(config)
    assert 3 < head / block < 8, "worth three blocks and more: so the last stage has one, and seven are left for three"
    assert layers(config) == [(0, 3), (3, 5), (5, 7), (7, 8)]
    config.parallel.partition = "even"
    assert layers(config) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    config.parallel.partition = [1, 2, 1, 4]
    assert layers(config) == [(0, 1), (1, 3), (3, 4), (4, 8)]


def test_the_rank_with_the_head_has_fewer_layers_in_all_its_stages() -> None:
    """In zb_v the first rank holds the first stage and the last, here with a head worth two blocks: with twelve layers each of two ranks
    gets seven blocks' worth."""
    config = pipelined(model__num_layers=12, parallel__pp=2, parallel__schedule="zb_v")
    block, head = block_and_head(config)
    config.model.vocab_size = round(config.model.vocab_size * 2 * block / head)
    described = describe(config)
    assert [stage.rank for stage in described.stages] == [0, 1, 1, 0]
    sizes = [stage.last_layer - stage.first_layer for stage in described.stages]
    assert (sizes[0] + sizes[3], sizes[1] + sizes[2]) == (5, 7)
    assert sizes == [4, 4, 3, 1], "with two blocks the last stage would cost as much as the first does now: of equals the earlier"


def slowest_bound(config: Config, forward: list[int], backward: list[int]) -> Fraction:
    """The bubble of 1f1b on two ranks of which the last is the slower, and its backward no quicker than a forward of the first: the last
    never waits once it has begun, so a step is the first forward, its own work, and the last backward of rank 0."""
    m = config.parallel.micro_batches
    step = forward[0] + m * (forward[1] + backward[1]) + backward[0]
    busy = m * (sum(forward) + sum(backward))
    return 1 - Fraction(busy, 2 * step)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("chunked", [None, 8])
def test_bubble_of_unequal_stages(recompute: str, chunked: int | None) -> None:
    config = pipelined(parallel__pp=2, parallel__partition=[3, 5], parallel__recompute=recompute, train__loss_chunk_tokens=chunked)
    block, head = block_and_head(config)
    forward = [3 * block, 5 * block + head]
    again = [count * block if recompute == "full" else 0 for count in (3, 5)]
    again[1] += head if chunked else 0
    backward = [2 * flops + more for flops, more in zip(forward, again, strict=True)]
    assert describe(config).bubble_fraction == pytest.approx(float(slowest_bound(config, forward, backward)), abs=1e-12)


def test_peaks_and_schedule() -> None:
    described = describe(pipelined(parallel__schedule="gpipe"))
    assert described.peaks == [8] * 4
    assert [len(actions) for actions in described.schedule] == [16] * 4
    assert describe(pipelined()).peaks == [4, 3, 2, 1]


def test_one_process_has_no_bubble() -> None:
    described = describe(small_config())
    assert (described.bubble_fraction, described.peaks, len(described.stages)) == (0, [1], 1)
    assert described.stages[0].parameters == num_parameters(small_config().model)


def test_costs_add_up_to_three_forwards() -> None:
    """The backward's two parts together cost two forwards; attention's share of them is all in the input gradient."""
    config = pipelined(parallel__schedule="zb_v")
    ranks = [0, 1, 2, 3, 3, 2, 1, 0]
    bounds = stage_layers(config, ranks)
    costs = stage_costs(config, bounds)
    assert len(bounds) == len(ranks)
    for stage, (first, last) in enumerate(bounds):
        assert costs.input_gradient[stage] + costs.weight_gradient[stage] == 2 * costs.forward[stage]
        h, ffn = config.model.hidden_size, config.model.ffn_hidden_size
        head = config.model.vocab_size * h * (stage == len(bounds) - 1)
        assert costs.weight_gradient[stage] == 2 * ((last - first) * (4 * h * h + 2 * h * ffn) + head)
        assert costs.input_gradient[stage] - costs.forward[stage] == (last - first) * 4 * config.model.hidden_size * config.data.seq_len
