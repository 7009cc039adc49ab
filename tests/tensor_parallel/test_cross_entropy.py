"""Vocab-parallel cross entropy against torch.nn.functional.cross_entropy of the whole logits."""

from __future__ import annotations

import math
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.tensor_parallel.support import collectives, on_ranks, part, random, strides_of
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.communication import shard_bounds
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX, Vocabulary, vocab_parallel_cross_entropy

TOKENS = 12
VOCABULARIES = (257, 8, 5, 4)
"""Not divisible, divisible; 5 over 4 ranks and 4 over 3 leave the last rank without columns."""


def drawn_targets(vocabulary: int) -> Tensor:
    targets = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(2))
    targets[:3] = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    targets[5] = targets[8] = IGNORE_INDEX
    return targets


def twin_loss(whole: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The loss of each token and, for the output gradient that `check` uses, the logits' gradient."""
    twin = whole.detach().float().requires_grad_()
    loss = F.cross_entropy(twin, targets, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, twin, random(TOKENS, seed=3))
    return loss.detach(), gradient


def check(mesh: Mesh, whole: Tensor, targets: Tensor, smoothing: float = 0.0) -> None:
    mine = (1, mesh.tp_size, mesh.tp_rank)
    start, _ = shard_bounds(whole.shape[1], mesh.tp_size, mesh.tp_rank)
    logits = part(whole, *mine).detach().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, targets, Vocabulary(start, whole.shape[1], mesh.tp_group), smoothing)
    expected, gradient = twin_loss(whole, targets, smoothing)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=2e-6, atol=2e-6 if not smoothing else 1e-5)
    loss.backward(random(TOKENS, seed=3))
    assert logits.grad is not None
    assert logits.grad.dtype == whole.dtype
    assert logits.grad.shape == logits.shape
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if whole.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(logits.grad, part(gradient, *mine).to(whole.dtype), **tolerance)


@on_ranks()
def test_loss_and_gradient_of_a_vocabulary_that_tp_does_not_divide(mesh: Mesh) -> None:
    for vocabulary, smoothing in product(VOCABULARIES, (0.0, 0.1)):
        for lay_out in strides_of(mesh.tp_rank).values():
            check(mesh, lay_out(random(TOKENS, vocabulary, seed=1)), drawn_targets(vocabulary), smoothing)
        check(mesh, random(TOKENS, vocabulary, seed=1).bfloat16(), drawn_targets(vocabulary), smoothing)


@on_ranks()
def test_huge_logits_neither_overflow_nor_lose_their_difference(mesh: Mesh) -> None:
    """exp overflows unless the maximum is taken off, all are 0 if it is taken off wrongly, and a loss that is the difference of two
    numbers near 1e4 has lost its digits."""
    for vocabulary, smoothing in product((257, 5), (0.0, 0.1)):
        whole, targets = random(TOKENS, vocabulary, seed=1), drawn_targets(vocabulary)
        check(mesh, whole + 1e4, targets, smoothing)
        check(mesh, whole - 1e4, targets, smoothing)
        check(mesh, whole * 1e3, targets, smoothing)  # one column outweighs all others


@on_ranks()
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(mesh: Mesh) -> None:
    """Whatever the vocabulary and tp: a column too many in the sum would show."""
    for vocabulary, smoothing in product((5, 7, 257), (0.0, 0.3)):
        start, stop = shard_bounds(vocabulary, mesh.tp_size, mesh.tp_rank)
        logits = torch.full((vocabulary, stop - start), -3.0, requires_grad=True)
        whole = Vocabulary(start, vocabulary, mesh.tp_group)
        loss = vocab_parallel_cross_entropy(logits, torch.arange(vocabulary), whole, smoothing)
        assert_close(loss, torch.full((vocabulary,), float(vocabulary)).log())
        loss.sum().backward()
        rows = torch.eye(vocabulary)[:, start:stop]
        assert_close(logits.grad, (1 - smoothing) * (1 / vocabulary - rows))


@on_ranks()
def test_smoothing_divides_by_the_whole_vocabulary_not_the_part(mesh: Mesh) -> None:
    """By the formula log(sum exp z) - (1 - e) z_t - e/V sum z, whose last two terms' gradient is -(1 - e) onehot - e/V."""
    vocabulary, smoothing = 10, 0.25
    start, stop = shard_bounds(vocabulary, mesh.tp_size, mesh.tp_rank)
    whole, targets = random(TOKENS, vocabulary, seed=1), torch.arange(TOKENS) % vocabulary
    logits = whole[:, start:stop].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, targets, Vocabulary(start, vocabulary, mesh.tp_group), smoothing)
    own = whole.gather(1, targets.unsqueeze(1)).squeeze(1)
    assert_close(loss, whole.logsumexp(1) - (1 - smoothing) * own - smoothing / vocabulary * whole.sum(1))
    loss.sum().backward()
    expected = whole.softmax(1) - (1 - smoothing) * F.one_hot(targets, vocabulary) - smoothing / vocabulary
    assert_close(logits.grad, expected[:, start:stop])


@on_ranks()
def test_ignored_targets_have_no_loss_and_no_gradient(mesh: Mesh) -> None:
    """No rank owns the target -100: without a mask in both directions its loss is log(sum exp) and its gradient the softmax."""
    for vocabulary, smoothing in product((257, 5), (0.0, 0.1)):
        start, stop = shard_bounds(vocabulary, mesh.tp_size, mesh.tp_rank)
        for targets in (drawn_targets(vocabulary), torch.full((TOKENS,), IGNORE_INDEX)):
            logits = random(TOKENS, vocabulary, seed=1)[:, start:stop].clone().requires_grad_()
            loss = vocab_parallel_cross_entropy(logits, targets, Vocabulary(start, vocabulary, mesh.tp_group), smoothing)
            loss.sum().backward()
            ignored = targets == IGNORE_INDEX
            assert (loss[ignored] == 0).all()
            assert (logits.grad[ignored] == 0).all()
            assert (loss[~ignored] > 0).all()
            if stop > start:
                assert (logits.grad[~ignored] != 0).any(dim=1).all()


@on_ranks()
def test_padding_columns_count_for_nothing(mesh: Mesh) -> None:
    """Parts with more columns than the vocabulary: of 10 tokens over parts of 4 (tp=4), two columns of the third part and all of
    the fourth are padding. Whatever they hold, the loss is that of the vocabulary and their gradient is 0."""
    vocabulary, columns = 10, {1: 12, 2: 6, 3: 5, 4: 4}[mesh.tp_size]
    start = mesh.tp_rank * columns
    width = max(0, min(columns, vocabulary - start))
    whole, targets = random(TOKENS, vocabulary, seed=1), drawn_targets(vocabulary)
    for padding, smoothing in product((1e30, math.inf, math.nan, 50.0), (0.0, 0.1)):
        logits = torch.full((TOKENS, columns), padding)
        logits[:, :width] = whole[:, start : start + width]
        logits.requires_grad_()
        loss = vocab_parallel_cross_entropy(logits, targets, Vocabulary(start, vocabulary, mesh.tp_group), smoothing)
        expected, gradient = twin_loss(whole, targets, smoothing)
        assert_close(loss, expected)
        loss.backward(random(TOKENS, seed=3))
        assert_close(logits.grad[:, :width], gradient[:, start : start + width])
        assert (logits.grad[:, width:] == 0).all()


@on_ranks()
def test_logits_and_targets_are_not_changed(mesh: Mesh) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        start, stop = shard_bounds(257, mesh.tp_size, mesh.tp_rank)
        logits = random(TOKENS, 257, seed=1)[:, start:stop].to(dtype).requires_grad_()
        targets, gradient = drawn_targets(257), random(TOKENS, seed=3)
        kept = [tensor.detach().clone() for tensor in (logits, targets, gradient)]
        loss = vocab_parallel_cross_entropy(logits, targets, Vocabulary(start, 257, mesh.tp_group), 0.1)
        loss.backward(gradient)
        for tensor, value in zip((logits, targets, gradient), kept, strict=True):
            assert torch.equal(tensor, value)


@on_ranks("tp1", "tp2")
def test_a_second_backward_is_refused(mesh: Mesh) -> None:
    """The gradient is written over what forward kept: to go back through it once more is an error, not another gradient."""
    start, stop = shard_bounds(257, mesh.tp_size, mesh.tp_rank)
    logits = random(TOKENS, 257, seed=1)[:, start:stop].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, drawn_targets(257), Vocabulary(start, 257, mesh.tp_group)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@on_ranks()
def test_loss_is_equal_on_all_ranks(mesh: Mesh) -> None:
    start, stop = shard_bounds(257, mesh.tp_size, mesh.tp_rank)
    loss = vocab_parallel_cross_entropy(
        random(TOKENS, 257, seed=1)[:, start:stop], drawn_targets(257), Vocabulary(start, 257, mesh.tp_group), 0.1
    )  # fmt: skip
    every = [torch.empty_like(loss) for _ in range(mesh.tp_size)]
    dist.all_gather(every, loss, group=mesh.tp_group)
    assert all(torch.equal(other, loss) for other in every)


@on_ranks()
def test_the_whole_logits_exist_on_no_rank(mesh: Mesh) -> None:
    """Two all-reduces forward (a maximum, a sum) of n and 2n or 3n numbers, none backward; none of them as large as the logits."""
    for smoothing, sums in ((0.0, 2), (0.1, 3)):
        start, stop = shard_bounds(64, mesh.tp_size, mesh.tp_rank)
        logits = random(TOKENS, 64, seed=1)[:, start:stop].requires_grad_()
        sizes, all_reduce = [], dist.all_reduce

        def counted(tensor: Tensor, *args, sizes=sizes, all_reduce=all_reduce, **kwargs):
            sizes.append(tensor.numel())
            return all_reduce(tensor, *args, **kwargs)

        with mock.patch.object(dist, "all_reduce", counted):
            with collectives() as forward:
                loss = vocab_parallel_cross_entropy(logits, torch.arange(TOKENS), Vocabulary(start, 64, mesh.tp_group), smoothing)
            with collectives() as backward:
                loss.sum().backward()
        assert forward == ({} if mesh.tp_size == 1 else {"allreduce": 2})
        assert sizes == ([] if mesh.tp_size == 1 else [TOKENS, sums * TOKENS])
        assert backward == {}
