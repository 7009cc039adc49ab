"""The conjugate pair against its formulas, on groups of 1, 2 and 4 ranks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, mesh_of, random
from tptrain.tensor_parallel.collectives import copy_to_group, reduce_from_group
from tptrain.tensor_parallel.communication import all_reduce

LAYOUTS = [(1, {"tp": 1}), (2, {"tp": 2}), (4, {"tp": 4}), (4, {"tp": 2, "dp": 2})]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_copy_and_reduce(world: int) -> None:
    run_ranks(world, check_all, [layout for size, layout in LAYOUTS if size == world])


def check_all(rank: int, layouts: list[dict[str, int]]) -> None:
    for layout in layouts:
        mesh = mesh_of(**layout)
        check_formulas(mesh)
        check_gradient_numerically(mesh)
        check_how_often_they_communicate(mesh)


def check_formulas(mesh) -> None:
    group, size, me = mesh.tp_group, mesh.tp_size, mesh.tp_rank
    strides = {
        "contiguous": lambda t: t.clone(),
        "transposed": lambda t: t.t().contiguous().t(),
        "transposed on one rank alone": lambda t: t.t().contiguous().t() if me == 0 else t.clone(),
        "every second": lambda t: torch.stack((t, t), dim=2).flatten(1)[:, ::2],
        "expanded": lambda t: t[:1, :1].expand(3, 5),
    }
    for name, lay_out in strides.items():
        every_x = [lay_out(random(3, 5, seed=10 + i)) for i in range(size)]
        every_gradient = [lay_out(random(3, 5, seed=20 + i)) for i in range(size)]
        kept_x, kept_gradient = every_x[me].clone(), every_gradient[me].clone()
        for function, forward, backward in (
            (copy_to_group, every_x[me], sum(every_gradient)),  # forward: identity, backward: the ranks' sum
            (reduce_from_group, sum(every_x), every_gradient[me]),  # forward: the ranks' sum, backward: identity
        ):
            x = every_x[me].detach().requires_grad_()
            y = function(x, group)
            assert_close(y, forward, msg=lambda text, f=function, n=name: f"{f.__name__} forward, {n}: {text}")
            (gradient,) = torch.autograd.grad(y, x, every_gradient[me])
            assert_close(gradient, backward, msg=lambda text, f=function, n=name: f"{f.__name__} backward, {n}: {text}")
            assert torch.equal(x, kept_x), "the caller's input changed"
            assert torch.equal(every_gradient[me], kept_gradient), "the incoming gradient changed"
        total = all_reduce(every_x[me], group)
        assert_close(total, sum(every_x))
        assert total.data_ptr() != every_x[me].data_ptr()
        assert torch.equal(every_x[me], kept_x)

    x = random(3, 5, seed=30).requires_grad_()
    copy_to_group(x, group).sum().backward()  # autograd's own gradient of a sum is one number expanded, stride 0
    assert_close(x.grad, torch.full((3, 5), float(size)))


def check_gradient_numerically(mesh) -> None:
    """Between the two, split work: the gradient is that of the whole function, not a multiple of it."""
    share = random(4, 3, seed=40 + mesh.tp_rank).double()

    def split(x: torch.Tensor) -> torch.Tensor:
        return reduce_from_group(torch.tanh(copy_to_group(x, mesh.tp_group) @ share), mesh.tp_group)

    x = random(2, 4, seed=50).double().requires_grad_()
    assert torch.autograd.gradcheck(split, (x,))
    shares = [random(4, 3, seed=40 + i).double() for i in range(mesh.tp_size)]
    assert_close(split(x), sum(torch.tanh(x @ s) for s in shares))


def check_how_often_they_communicate(mesh) -> None:
    once = {} if mesh.tp_size == 1 else {"allreduce": 1}
    for function, forward, backward in ((copy_to_group, {}, once), (reduce_from_group, once, {})):
        x = random(2, 3, seed=1).requires_grad_()
        with collectives() as counted:
            y = function(x, mesh.tp_group)
        assert counted == forward, f"{function.__name__} forward: {counted}"
        with collectives() as counted:
            y.sum().backward()
        assert counted == backward, f"{function.__name__} backward: {counted}"
