from __future__ import annotations

import torch

from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, mesh_of
from tptrain.tensor_parallel.broadcast import broadcast_from_first


def test_every_rank_of_a_group_gets_the_first_one_s_batch() -> None:
    run_ranks(4, check)


def check(rank: int) -> None:
    for tp in (1, 2, 4):
        mesh = mesh_of(tp=tp, dp=4 // tp)
        first = rank - rank % tp  # the group's first rank: with tp=2 not rank 0 in the second group
        whole = {
            dtype: [(torch.arange(6) + 100 * rank).view(2, 3).to(dtype), (torch.arange(4) - 100 * rank).view(2, 2).t().to(dtype)]
            for dtype in (torch.int64, torch.float32)
        }
        batch = [tensor.clone() for tensors in zip(*whole.values(), strict=True) for tensor in tensors]  # dtypes in turns
        expected = [
            tensor.to(dtype)
            for tensor in ((torch.arange(6) + 100 * first).view(2, 3), (torch.arange(4) - 100 * first).view(2, 2).t())
            for dtype in whole
        ]
        with collectives() as counted:
            broadcast_from_first(batch, mesh.tp_group)
        for got, wanted in zip(batch, expected, strict=True):
            assert torch.equal(got, wanted), (tp, wanted.dtype)
        assert counted == ({} if tp == 1 else {"broadcast": 2}), "one message a dtype"
