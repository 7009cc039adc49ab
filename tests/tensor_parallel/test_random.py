"""Dropout whose masks belong to the sample, the place and the head, whatever the layout and whoever draws them."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from tests.tensor_parallel.support import CPU, on_ranks, part, random
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.random import Stream, dropout, dropout_heads, keep_mask

P = 0.25
SIGMAS = 5
"""Seeds are fixed, so that a bound holds for ever or never; by chance it would fail once in two million draws."""


def mask(stream: Stream, *shape: int, probability: float = P) -> Tensor:
    return keep_mask(stream, torch.Size(shape), probability, CPU)


def assert_independent(first: Tensor, second: Tensor) -> None:
    """Two masks agree where both keep or both drop: a share of (1-p)^2 + p^2, not all, nor shifted or inverted copies."""
    expected = (1 - P) ** 2 + P**2
    agree = ((first == 0) == (second == 0)).float().mean().item()
    assert abs(agree - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / first.numel()), agree


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5, 0.9])
def test_share_of_zeros_and_mean(probability: float) -> None:
    drawn = mask(Stream(1, 0).at("x"), 4, 50, 100, probability=probability)
    count = drawn.numel()
    zeros = (drawn == 0).double().mean().item()
    assert abs(zeros - probability) < SIGMAS * math.sqrt(probability * (1 - probability) / count)
    assert_close(drawn[drawn != 0], torch.full((int((drawn != 0).sum()),), 1 / (1 - probability)))
    deviation = math.sqrt(probability / (1 - probability) / count)  # of the mean of a mask whose values are 0 and 1/(1-p)
    assert abs(drawn.double().mean().item() - 1) < SIGMAS * deviation
    assert drawn.dtype == torch.float32


def test_each_seed_sample_row_and_place_has_a_mask_of_its_own() -> None:
    """Nothing re-seeds with the same number at each call: samples, layers and places differ, and sums of numbers do not collide."""
    streams = [
        Stream(1, 0), Stream(2, 0), Stream(1, 4), Stream(2, 4), Stream(12, 3), Stream(1, 23), Stream(0, 1),
        Stream(1, 0).at("layer 0"), Stream(1, 0).at("layer 1"), Stream(1, 0).at("layer 0").at("mlp"), Stream(1, 0).at("mlp").at("layer 0"),
        Stream(1, 4).at("layer 0"), Stream(2, 0).at("layer 0"),
    ]  # fmt: skip
    rows = [row for stream in streams for row in mask(stream, 2, 40, 50)]
    for first, second in combinations(rows, 2):
        assert_independent(first, second)


def test_a_sample_s_mask_does_not_depend_on_the_micro_batch_it_comes_in() -> None:
    stream = Stream(3, 10).at("embedding")
    whole = mask(stream, 6, 5, 4)
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        assert torch.equal(mask(Stream(3, 10 + start).at("embedding"), stop - start, 5, 4), whole[start:stop])


def test_masks_are_drawn_again_without_global_state() -> None:
    x, stream = random(2, 6, 4, seed=1), Stream(5, 8).at("mlp")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dropout(x, P, stream)
    heads = dropout_heads(random(2, 3, 5, 5, seed=2), P, stream, 0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(2)
    torch.rand(17)
    mask(stream.at("another place"), 2, 3)
    assert torch.equal(dropout(x, P, stream), first), "recomputation in backward would draw another mask"
    assert torch.equal(dropout_heads(random(2, 3, 5, 5, seed=2), P, Stream(5, 8, "/mlp"), 0), heads)
    assert torch.equal(dropout(x, P, Stream(5, 8).at("mlp")), first)


def test_nothing_is_dropped_outside_of_training() -> None:
    x = random(2, 6, 4, seed=1)
    for function in (dropout, lambda x, p, stream: dropout_heads(x, p, stream, 0)):
        assert function(x, P, None) is x
        assert function(x, 0.0, Stream(1, 0)) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_and_gradient_are_the_mask_times_theirs(dtype: torch.dtype) -> None:
    stream = Stream(1, 0).at("x")
    heads = torch.stack([mask(stream.at(f"head {2 + i}"), 2, 5, 5) for i in range(3)], dim=1)
    cases = (
        (lambda x: dropout(x, P, stream), mask(stream, 2, 6, 4)),
        (lambda x: dropout_heads(x, P, stream, 2), heads),
    )
    for function, factor in cases:
        x, gradient = random(*factor.shape, seed=1).to(dtype).requires_grad_(), random(*factor.shape, seed=2).to(dtype)
        kept = x.detach().clone()
        y = function(x)
        assert y.dtype == dtype
        assert_close(y, x.detach() * factor.to(dtype))
        y.backward(gradient)
        assert_close(x.grad, gradient * factor.to(dtype))
        assert torch.equal(x, kept)


def test_heads_have_masks_of_their_own_that_do_not_depend_on_tp() -> None:
    stream, heads = Stream(1, 0).at("attention"), 4
    x = torch.ones(2, heads, 30, 30)
    whole = dropout_heads(x, P, stream, 0)
    for first, second in combinations([whole[row, head] for row in range(2) for head in range(heads)], 2):
        assert_independent(first, second)
    for tp in (1, 2, 4):
        mine = [dropout_heads(part(x, 1, tp, rank), P, stream, rank * heads // tp) for rank in range(tp)]
        assert torch.equal(torch.cat(mine, dim=1), whole)


@on_ranks()
def test_replicated_activations_have_one_mask_on_all_ranks(mesh: Mesh) -> None:
    torch.manual_seed(dist.get_rank())  # what a rank's global generator holds says nothing
    y = dropout(random(2, 12, 5, seed=1), P, Stream(1, 6).at("mlp"))
    every = [torch.empty_like(y) for _ in range(mesh.world.size())]
    dist.all_gather(every, y, group=mesh.world)
    assert all(torch.equal(other, y) for other in every)
    assert_close(y, random(2, 12, 5, seed=1) * mask(Stream(1, 6).at("mlp"), 2, 12, 5))


@on_ranks()
def test_slices_of_a_split_sequence_put_together_have_the_mask_of_the_whole(mesh: Mesh) -> None:
    torch.manual_seed(dist.get_rank())
    stream, whole = Stream(1, 6).at("mlp"), random(2, 12, 5, seed=1)
    x = part(whole, 1, mesh.tp_size, mesh.tp_rank).clone().requires_grad_()
    y = dropout(x, P, stream, mesh.tp_group)
    assert torch.equal(y, part(dropout(whole, P, stream), 1, mesh.tp_size, mesh.tp_rank))
    every = [torch.empty_like(y) for _ in range(mesh.tp_size)]
    dist.all_gather(every, y.detach(), group=mesh.tp_group)
    assert torch.equal(torch.cat(every, dim=1), dropout(whole, P, stream))
    gradient = random(*y.shape, seed=2)
    y.backward(gradient)
    assert_close(x.grad, gradient * part(mask(stream, 2, 12, 5), 1, mesh.tp_size, mesh.tp_rank))
