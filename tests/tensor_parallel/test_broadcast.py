from __future__ import annotations

import torch
from torch import Tensor

from tests.tensor_parallel.support import collectives, on_ranks
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.broadcast import broadcast_from_first


@on_ranks()
def test_every_rank_of_a_group_gets_the_first_one_s_batch(mesh: Mesh) -> None:
    """Tensors of two dtypes in turns, contiguous, transposed, every second, a scalar and an empty one, each in its own place."""

    def batch_of(rank: int) -> list[Tensor]:
        def pair(values: Tensor) -> list[Tensor]:
            return [values, values.float() / 3]

        return [
            *pair((torch.arange(6) + 100 * rank).view(2, 3)),
            *pair((torch.arange(6) - 100 * rank).view(2, 3).t()),
            *pair((torch.arange(8) + 1000 * rank)[::2]),
            *pair(torch.tensor(rank + 7)),
            *pair(torch.empty(0, 3, dtype=torch.int64)),
        ]

    me = torch.distributed.get_rank()
    batch, expected = batch_of(me), batch_of(me - mesh.tp_rank)  # the group's first rank: with dp=2 not rank 0 in the second group
    places = [(tensor.data_ptr(), tensor.stride()) for tensor in batch]
    with collectives() as counted:
        broadcast_from_first(batch, mesh.tp_group)
    for got, wanted, place in zip(batch, expected, places, strict=True):
        assert torch.equal(got, wanted)
        assert (got.data_ptr(), got.stride()) == place, "filled in place"
    assert counted == ({} if mesh.tp_size == 1 else {"broadcast": 2}), "one message a dtype"
