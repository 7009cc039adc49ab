"""The norm and the clip against torch.nn.utils.clip_grad_norm_ of the whole, unsplit gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, mesh_of, random
from tptrain.optim.grad_norm import clip_scale, scale_gradients, squared_norm

CPU = torch.device("cpu")
SHAPES = [(8, 6), (7, 3), (5, 9), (3, 8), (4,), (1,)]  # evenly split, unevenly, with ranks that own nothing


def whole_gradients(count: int = len(SHAPES)) -> list[Tensor]:
    """Of quite different sizes, so that one counted twice shows whichever it is."""
    return [random(*shape, seed=i) * (i + 1) for i, shape in enumerate(SHAPES[:count])]


def torch_clips(gradients: list[Tensor], limit: float) -> tuple[Tensor, list[Tensor]]:
    """The norm before, and the gradients after."""
    parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm, [parameter.grad for parameter in parameters]


def test_one_process() -> None:
    gradients = whole_gradients()
    expected, _ = torch_clips(gradients, 1.0)
    squared = squared_norm(gradients, CPU)
    assert squared.dtype == torch.float64
    assert squared.shape == ()
    assert_close(squared.sqrt().float(), expected)
    assert_close(squared_norm(iter(gradients), CPU), squared)


def test_nothing_to_count() -> None:
    for gradients in ([], [torch.empty(0, 3)]):
        squared = squared_norm(gradients, CPU)
        assert squared.dtype == torch.float64
        assert squared.shape == ()
        assert squared == 0


def test_tensors_are_added_in_fp64() -> None:
    """Each one's square is within fp32, which ends at 3.4e38; their sum is not."""
    assert squared_norm([torch.full((1,), 1.5e19)] * 4, CPU).sqrt().item() == pytest.approx(3e19)


@pytest.mark.parametrize("limit", [0.01, 1.0, 1e9])
def test_clip_is_torch_s(limit: float) -> None:
    gradients = whole_gradients()
    norm, expected = torch_clips(gradients, limit)
    scale = clip_scale(squared_norm(gradients, CPU).sqrt(), limit)
    scale_gradients(gradients, scale)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    after = squared_norm(gradients, CPU).sqrt().item()
    assert after == pytest.approx(min(limit, norm.item()), rel=1e-5)


def test_clip_scale_at_its_corners() -> None:
    def scale(norm: float, limit: float) -> float:
        return clip_scale(torch.tensor(norm, dtype=torch.float64), limit).item()

    assert scale(2.0, 0.5) == 0.25
    assert scale(0.5, 0.5) == 1.0
    assert scale(0.1, 0.5) == 1.0, "small gradients are never enlarged"
    assert scale(0.0, 0.5) == 1.0, "all gradients zero"
    assert scale(float("inf"), 0.5) == 0.0
    assert scale(float("nan"), 0.5) != scale(float("nan"), 0.5), "a NaN stays one on every rank"


@pytest.mark.parametrize("world", [2, 4])
def test_split_gradients(world: int) -> None:
    run_ranks(world, check_all)


def check_all(rank: int) -> None:
    world = dist.get_world_size()
    mesh = mesh_of(tp=world)
    check(mesh.tp, [(placement,) for placement in (Shard(0), Replicate(), Shard(0), Shard(1), Replicate(), Shard(0))])
    check(mesh.tp, [(Replicate(),)] * len(SHAPES))
    check(mesh.tp, [(Shard(0),)] * len(SHAPES))
    if world == 4:
        mesh = mesh_of(dp=2, tp=2)  # what fully_shard makes of tp-labelled parameters: dp first, then tp
        both = [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Shard(1), Shard(0)), (Shard(0), Shard(0)), (Shard(0), Replicate())]
        check(mesh.dp_tp, [*both, (Replicate(), Replicate())])
        check(mesh.dp_tp, [(Replicate(), Shard(0))] * len(SHAPES))
        check(mesh.dp_tp, [(_StridedShard(0, split_factor=2), Shard(0)), (Replicate(), Shard(0))])
    check_stages(mesh_of(pp=world))
    if world == 4:
        check_stages(mesh_of(pp=2, tp=2))


def total(squared: Tensor) -> Tensor:
    """Summed over all ranks, one scalar from each."""
    assert squared.dtype == torch.float64
    dist.all_reduce(squared)
    return squared.sqrt().float()


def check(mesh, placements: list[tuple]) -> None:
    whole = whole_gradients(len(placements))
    expected, clipped = torch_clips(whole, 2.0)
    split = [distribute_tensor(gradient, mesh, list(where)) for gradient, where in zip(whole, placements, strict=True)]
    with collectives() as counted:
        squared = squared_norm(split, CPU)
    assert counted == {}, "the caller's one all-reduce is enough"
    norm = total(squared)
    assert_close(norm, expected, msg=lambda text: f"{placements}: {text}")
    scale_gradients(split, clip_scale(norm.double(), 2.0))
    for ours, theirs in zip(split, clipped, strict=True):
        assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-6)


def check_stages(mesh) -> None:
    """Each stage has its own gradients, the last none at all and yet takes part."""
    mine = range(mesh.pp_rank, len(SHAPES), mesh.pp_size - 1) if mesh.pp_rank < mesh.pp_size - 1 else ()
    gradients: list[DTensor] = [distribute_tensor(whole_gradients()[i], mesh.tp, [Shard(0) if i % 2 else Replicate()]) for i in mine]
    expected, _ = torch_clips(whole_gradients(), 1.0)
    assert_close(total(squared_norm(gradients, CPU)), expected)


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    """Squares of millions of elements, added in fp32 one after the other, are off in the fourth digit."""
    gradient = torch.randn(3_000_001, generator=torch.Generator().manual_seed(1)) * 1e-3
    expected = gradient.double().square().sum().item()
    assert squared_norm([gradient], torch.device("cpu")).item() == pytest.approx(expected, rel=2e-6)
