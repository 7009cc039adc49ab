"""Vocab-parallel cross entropy against torch.nn.functional.cross_entropy of the whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, mesh_of, part, random
from tptrain.tensor_parallel.communication import shard_bounds
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX, Vocabulary, vocab_parallel_cross_entropy

LAYOUTS = [(1, {"tp": 1}), (2, {"tp": 2}), (4, {"tp": 4}), (4, {"tp": 2, "dp": 2})]
TOKENS = 12


@pytest.mark.parametrize("world", [1, 2, 4])
def test_cross_entropy(world: int) -> None:
    run_ranks(world, check_all, [layout for size, layout in LAYOUTS if size == world])


def check_all(rank: int, layouts: list[dict[str, int]]) -> None:
    for layout in layouts:
        mesh = mesh_of(**layout)
        for vocabulary in (257, 8, 5):  # not divisible, divisible, fewer blocks of rows than ranks
            whole = random(TOKENS, vocabulary, seed=1)
            targets = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(2))
            targets[:3] = torch.tensor([0, vocabulary - 1, vocabulary // 2])
            targets[5] = targets[8] = IGNORE_INDEX
            check(mesh, whole, targets)
            check(mesh, whole + 1e4, targets)  # exp overflows without the maximum taken off
            check(mesh, whole - 1e4, targets)  # every exp is 0 if it is taken off wrongly
            check(mesh, whole * 1e3, targets)  # one column outweighs all others
            check(mesh, whole.t().contiguous().t(), targets)
            check(mesh, whole, torch.full((TOKENS,), IGNORE_INDEX))
            check(mesh, whole.bfloat16(), targets)
        check_communication(mesh)
        check_no_column_is_added(mesh)


def check(mesh, whole: Tensor, targets: Tensor) -> None:
    mine = (1, mesh.tp_size, mesh.tp_rank)
    start, _ = shard_bounds(whole.shape[1], mesh.tp_size, mesh.tp_rank)
    logits = part(whole, *mine).detach().requires_grad_()
    kept_logits, kept_targets = logits.detach().clone(), targets.clone()
    loss = vocab_parallel_cross_entropy(logits, targets, Vocabulary(start, whole.shape[1], mesh.tp_group))

    twin = whole.detach().float().requires_grad_()
    expected = F.cross_entropy(twin, targets, reduction="none", ignore_index=IGNORE_INDEX)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=2e-6, atol=2e-6)
    assert (loss[targets == IGNORE_INDEX] == 0).all()

    gradient = random(TOKENS, seed=3)
    loss.backward(gradient)
    expected.backward(gradient)
    assert logits.grad.dtype == whole.dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if whole.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(logits.grad, part(twin.grad, *mine).to(whole.dtype), **tolerance)
    assert (logits.grad[targets == IGNORE_INDEX] == 0).all()
    assert torch.equal(logits, kept_logits), "the caller's logits changed"
    assert torch.equal(targets, kept_targets)


def check_communication(mesh) -> None:
    """Two all-reduces forward (a maximum, a sum) of n and 2n numbers, none backward; none of them as large as the logits."""
    vocabulary = 64
    start, stop = shard_bounds(vocabulary, mesh.tp_size, mesh.tp_rank)
    logits = random(TOKENS, vocabulary, seed=1)[:, start:stop].requires_grad_()
    sizes = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: Tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        with collectives() as forward:
            loss = vocab_parallel_cross_entropy(logits, torch.arange(TOKENS), Vocabulary(start, vocabulary, mesh.tp_group))
        with collectives() as backward:
            loss.sum().backward()
    finally:
        torch.distributed.all_reduce = all_reduce
    assert forward == ({} if mesh.tp_size == 1 else {"allreduce": 2})
    assert sizes == ([] if mesh.tp_size == 1 else [TOKENS, 2 * TOKENS])
    assert backward == {}


def check_no_column_is_added(mesh) -> None:
    """Equal logits over v tokens cost log(v), whatever v and tp: a padded column in the sum would show."""
    for vocabulary in (5, 7, 257):
        start, stop = shard_bounds(vocabulary, mesh.tp_size, mesh.tp_rank)
        logits = torch.full((vocabulary, stop - start), -3.0, requires_grad=True)
        loss = vocab_parallel_cross_entropy(logits, torch.arange(vocabulary), Vocabulary(start, vocabulary, mesh.tp_group))
        assert_close(loss, torch.full((vocabulary,), float(vocabulary)).log())
        loss.sum().backward()
        rows = torch.eye(vocabulary)[:, start:stop]
        assert_close(logits.grad, 1 / vocabulary - rows)
