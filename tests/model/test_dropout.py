"""Dropout in the whole model: masks belong to the sample and the place, whatever the layout, and outside of training there are none."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from tests.model.plain_gpt import plain_gpt
from tests.model.support import FAMILIES, batch, check_against_twin, gpt2, llama, stage_like
from tests.ranks import run_ranks
from tests.tensor_parallel.support import mesh_of
from tptrain.mesh import Mesh
from tptrain.model.gpt import Execution
from tptrain.tensor_parallel import random as random_module
from tptrain.tensor_parallel.random import Stream, keep_mask

STREAM = Stream(11, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_equals_the_twin_with_the_same_masks(mesh: Mesh, family: str) -> None:
    check_against_twin(mesh, FAMILIES[family](dropout=0.3), stream=STREAM)


@pytest.mark.parametrize("world", [2, 4])
def test_every_split_equals_the_twin_with_the_same_masks(world: int) -> None:
    run_ranks(world, check_split)


def check_split(rank: int) -> None:
    mesh = mesh_of(tp=dist.get_world_size())
    for sequence_parallel in (False, True):
        for model in (gpt2(dropout=0.3), llama(dropout=0.3), llama(dropout=0.3, num_kv_heads=1)):
            check_against_twin(mesh, model, Execution(sequence_parallel), STREAM)
    check_against_twin(mesh, llama(dropout=0.3), Execution(True, "selective", 5), STREAM)
    check_against_twin(mesh, gpt2(dropout=0.3), Execution(True, "full", 5), STREAM)


def gradients(stage: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.to_local() for name, parameter in stage.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_stream_or_with_probability_zero_there_is_none(mesh: Mesh, family: str) -> None:
    model = FAMILIES[family]()
    twin = plain_gpt(model)
    runs = []
    for probability, stream in ((0.0, None), (0.3, None), (0.0, STREAM)):
        stage = stage_like(twin, replace(model, dropout=probability), mesh)
        loss = stage(*batch(model), stream)
        loss.backward()
        runs.append({"loss": loss} | gradients(stage))
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


@pytest.mark.parametrize(("family", "kv_heads"), [("gpt2", 4), ("llama", 1), ("llama", 4), ("llama", 8)])
def test_as_the_probability_goes_to_zero_so_does_the_difference(mesh: Mesh, family: str, kv_heads: int) -> None:
    """At 1e-9 all elements stay: what is left to compare is attention with and without the kernel."""
    model = FAMILIES[family](num_kv_heads=kv_heads)
    twin = plain_gpt(model)
    stages = [stage_like(twin, replace(model, dropout=probability), mesh) for probability in (0.0, 1e-9)]
    assert_close(stages[1](batch(model)[0], stream=STREAM), stages[0](batch(model)[0]), rtol=1e-5, atol=1e-5)
    losses = [stage(*batch(model), STREAM) / 34 for stage in stages]
    assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    expected, found = (gradients(stage) for stage in stages)
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_masks_differ_between_layers_places_and_samples(mesh: Mesh) -> None:
    model = gpt2(dropout=0.4, num_layers=3)
    stage = stage_like(plain_gpt(model), model, mesh)
    inputs, targets = batch(model)
    masks: dict[str, Tensor] = {}

    def recording(stream: Stream, *arguments: object) -> Tensor:
        mask = keep_mask(stream, *arguments)  # type: ignore[arg-type]
        assert stream.name not in masks, f"{stream.name} drew twice"
        masks[stream.name] = mask
        return mask

    with mock.patch.object(random_module, "keep_mask", recording):
        stage(inputs, targets, STREAM)
    # the embedding; of each layer attention's output, the MLP's, and the weights of each head
    assert len(masks) == 1 + model.num_layers * (2 + model.num_heads)
    rows = [row for mask in masks.values() for row in mask]
    s, h = inputs.shape[1], model.hidden_size
    assert sorted({tuple(row.shape) for row in rows}) == [(s, s), (s, h)]
    for one, other in itertools.combinations(rows, 2):
        if one.shape == other.shape:
            same = (one == other).float().mean()  # of independent masks: 0.6^2 + 0.4^2
            assert abs(same - 0.52) < 6 * (0.52 * 0.48 / one.numel()) ** 0.5
    kept = torch.cat([row.flatten() for row in rows]) > 0
    assert abs(kept.float().mean() - 0.6) < 5 * (0.24 / kept.numel()) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_belong_to_the_sample_not_to_its_row(mesh: Mesh, family: str) -> None:
    """However a batch is cut into micro-batches, the losses add up to the same; other samples and seeds have others."""
    model = FAMILIES[family](dropout=0.3)
    stage = stage_like(plain_gpt(model), model, mesh)
    inputs, targets = batch(model)
    loss = functools.partial(stage, inputs, targets)
    whole = loss(STREAM)
    cuts: Iterator[Tensor] = (stage(inputs[a:b], targets[a:b], Stream(11, 40 + a)) for a, b in ((0, 1), (1, 3)))
    assert_close(sum(cuts), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(loss(STREAM), whole)
    for other in (Stream(11, 41), Stream(12, 40)):
        assert abs(loss(other).item() - whole.item()) > 0.1
