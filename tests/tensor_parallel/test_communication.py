"""Communication on plain tensors against sums, concatenations and `torch.chunk`; gathers and reduce-scatters both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from tests.tensor_parallel.support import SPLIT, collectives, on_ranks, part, random, strides_of
from tptrain.mesh import Mesh
from tptrain.tensor_parallel import communication
from tptrain.tensor_parallel.communication import (
    all_reduce,
    all_reduce_flat,
    shard_bounds,
    shard_sizes,
    split,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)


def test_shard_bounds_are_those_of_torch_chunk() -> None:
    for size in range(60):
        for parts in range(1, 10):
            bounds = [shard_bounds(size, parts, i) for i in range(parts)]
            assert bounds[0][0] == 0
            assert bounds[-1][1] == size
            assert all(before[1] == after[0] for before, after in pairwise(bounds))
            chunks = [len(chunk) for chunk in torch.arange(size).chunk(parts)] if size else []
            assert shard_sizes(size, parts) == chunks + [0] * (parts - len(chunks)), (size, parts)


@on_ranks()
def test_split_is_this_rank_s_chunk(mesh: Mesh) -> None:
    for size, dim in ((8, 0), (7, 1), (5, -1), (3, 0), (1, -2)):
        x = random(*((size, 2) if dim in (0, -2) else (2, size)), seed=1)
        mine = split(x, dim, mesh.tp_group)
        assert torch.equal(mine, part(x, dim, mesh.tp_size, mesh.tp_rank))
        assert mine.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a view"


@on_ranks()
def test_all_reduce_owns_its_result(mesh: Mesh) -> None:
    for name, lay_out in strides_of(mesh.tp_rank).items():
        every_x = [lay_out(random(3, 5, seed=10 + i)) for i in range(mesh.tp_size)]
        x = every_x[mesh.tp_rank]
        kept = x.clone()
        for op, expected in ((dist.ReduceOp.SUM, sum(every_x)), (dist.ReduceOp.MAX, torch.stack(every_x).amax(0))):
            total = all_reduce(x, mesh.tp_group, op)
            assert_close(total, expected, msg=lambda text, n=name: f"{n}: {text}")
            check_owned(total, x)
            assert torch.equal(x, kept), f"{name}: the input changed"


@on_ranks()
def test_non_contiguous_input_is_reduced(mesh: Mesh) -> None:
    """What is returned is what was reduced: the copy that a non-contiguous input needs, not the input."""
    for name, lay_out in strides_of(mesh.tp_rank).items():
        every_x = [lay_out(random(3, 5, seed=10 + i)) for i in range(mesh.tp_size)]
        expected = sum(every_x) + 0  # in memory of its own: a contiguous input is reduced in place
        total = start_all_reduce(every_x[mesh.tp_rank], mesh.tp_group).wait()
        assert_close(total, expected, msg=lambda text, n=name: f"{n}: {text}")


@on_ranks()
def test_gathers_put_parts_side_by_side(mesh: Mesh) -> None:
    for size in (5, 7, 4 * mesh.tp_size):
        for dim in (0, 1, -1, -2):
            check_gather(mesh, dim, size)


@on_ranks()
def test_reduce_scatters_sum_and_split(mesh: Mesh) -> None:
    for size in (5, 7, 4 * mesh.tp_size):
        for dim in (0, 1, -1, -2):
            check_reduce_scatter(mesh, dim, size)


@on_ranks()
def test_library_calls_agree_with_formulas(mesh: Mesh) -> None:
    """The way that NCCL takes, on gloo: parts of equal size."""
    with library_calls():
        for dim in (0, 1, 2, -1, -2, -3):
            check_gather(mesh, dim, 2 * mesh.tp_size, gathers=1)
            check_reduce_scatter(mesh, dim, 2 * mesh.tp_size, scatters=1)


@on_ranks("tp2", "tp3", "tp4")
def test_unequal_parts_are_exchanged_on_any_device(mesh: Mesh) -> None:
    """NCCL's calls want equal parts, so they are taken for those alone: asked with what a tensor on a card says of itself."""
    card = mock.Mock(spec=Tensor, device=torch.device("cuda"))
    assert communication._by_exchange(card, shard_sizes(4 * mesh.tp_size + 1, mesh.tp_size))
    assert not communication._by_exchange(card, shard_sizes(4 * mesh.tp_size, mesh.tp_size))
    assert communication._by_exchange(torch.ones(1), shard_sizes(4 * mesh.tp_size, mesh.tp_size))


@on_ranks("tp3", "tp4")
def test_a_sum_has_the_same_bits_on_all_ranks(mesh: Mesh) -> None:
    """Whoever adds, adds in the order of the ranks: what one rank makes of all parts, the others would make too."""
    x = random(70, 3, seed=mesh.tp_rank).bfloat16()  # 8 bits: another order of three addends rounds otherwise
    same = torch.cat([x] * mesh.tp_size)
    mine = start_reduce_scatter(same, 0, mesh.tp_group).wait()
    everybody = start_all_gather(mine, 0, len(same), mesh.tp_group).wait().chunk(mesh.tp_size)
    assert all(torch.equal(other, mine) for other in everybody)


@on_ranks(*SPLIT)
def test_computation_may_run_before_the_wait(mesh: Mesh) -> None:
    """Several under way at once, waited for in another order than started."""
    group, size, me = mesh.tp_group, mesh.tp_size, mesh.tp_rank
    x = [random(2 * size, 3, seed=i) for i in range(size)]
    gather = start_all_gather(x[me], 0, 2 * size * size, group)
    scatter = start_reduce_scatter(x[me], 0, group)
    reduce = start_all_reduce(x[me].clone(), group)
    assert_close(reduce.wait(), sum(x))
    assert_close(scatter.wait(), part(sum(x), 0, size, me))
    assert_close(gather.wait(), torch.cat(x))


@on_ranks()
def test_flat_sum_takes_any_dtypes_shapes_and_strides(mesh: Mesh) -> None:
    def tensors(rank: int) -> list[Tensor]:
        return [
            random(3, 5, seed=10 * rank),
            random(4, seed=10 * rank + 1).double(),
            random(5, 3, seed=10 * rank + 2).t(),
            torch.tensor(rank + 0.5),
            random(2, 2, 2, seed=10 * rank + 3).double().transpose(0, 2),
            random(0, 3, seed=1),
            torch.arange(6).view(2, 3) * (rank + 1),
            torch.full((4,), 2.0**rank).bfloat16(),
            random(4, 6, seed=10 * rank + 4)[:, ::2],
        ]

    mine, every = tensors(mesh.tp_rank), [tensors(rank) for rank in range(mesh.tp_size)]
    places = [(tensor.data_ptr(), tensor.stride()) for tensor in mine]
    with collectives() as counted:
        all_reduce_flat(mine, mesh.tp_group)
    for tensor, place, *addends in zip(mine, places, *every, strict=True):
        assert_close(tensor, sum(addends))
        assert (tensor.data_ptr(), tensor.stride()) == place, "summed in place"
    assert counted == {"allreduce": 4}, "one message a dtype"
    with collectives() as counted:
        all_reduce_flat([], mesh.tp_group)
    assert counted == {}


def check_gather(mesh: Mesh, dim: int, size: int, **calls: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = size
    for name, lay_out in strides_of(mesh.tp_rank).items():
        every_x = [lay_out(part(random(*shape, seed=i), dim, mesh.tp_size, i)) for i in range(mesh.tp_size)]
        x = every_x[mesh.tp_rank]
        kept = x.clone()
        with collectives() as counted:
            whole = start_all_gather(x, dim, size, mesh.tp_group).wait()
        assert_close(whole, torch.cat(every_x, dim), rtol=0, atol=0, msg=lambda text, n=name: f"gather, dim {dim}, {n}: {text}")
        check_owned(whole, x)
        assert torch.equal(x, kept)
        if calls:
            assert sum(counted.values()) == calls["gathers"], counted


def check_reduce_scatter(mesh: Mesh, dim: int, size: int, **calls: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = size
    for name, lay_out in strides_of(mesh.tp_rank).items():
        every_x = [lay_out(random(*shape, seed=i)) for i in range(mesh.tp_size)]
        x = every_x[mesh.tp_rank]
        kept = x.clone()
        with collectives() as counted:
            mine = start_reduce_scatter(x, dim, mesh.tp_group).wait()
        expected = part(sum(every_x), dim, mesh.tp_size, mesh.tp_rank)
        assert_close(mine, expected, msg=lambda text, n=name: f"reduce-scatter, dim {dim}, {n}: {text}")
        check_owned(mine, x)
        assert torch.equal(x, kept)
        if calls:
            assert sum(counted.values()) == calls["scatters"], counted


def check_owned(result: Tensor, x: Tensor) -> None:
    assert result.is_contiguous()
    if result.numel():
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), "not in memory of its own"
        assert result.untyped_storage().nbytes() == result.numel() * result.element_size(), "holds on to more than itself"


@contextmanager
def library_calls() -> Iterator[None]:
    """Gather and reduce-scatter by one call, as on NCCL."""
    with mock.patch.object(communication, "_by_exchange", return_value=False):
        yield
