"""The conjugate pairs against their formulas, and their gradients against numeric ones of the whole function of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tensor_parallel.support import SPLIT, collectives, on_ranks, part, random, strides_of
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.collectives import (
    copy_to_group,
    gather_from_group,
    gather_from_sequence,
    reduce_from_group,
    reduce_scatter_to_sequence,
    scatter_to_group,
    scatter_to_sequence,
)


@dataclass
class Pair:
    """A function of the group, and what it and its backward make of all ranks' tensors, seen from rank `me`.

    whole: the shape where the tensor is whole; `in_dim` and `out_dim` say along which dimension input and output are split.
    """

    call: Callable[[Tensor], Tensor]
    whole: tuple[int, ...]
    in_dim: int | None
    out_dim: int | None
    forward: Callable[[Sequence[Tensor]], Tensor]
    backward: Callable[[Sequence[Tensor]], Tensor]


def pairs(mesh: Mesh) -> dict[str, Pair]:
    group, size, me = mesh.tp_group, mesh.tp_size, mesh.tp_rank

    def own(every: Sequence[Tensor]) -> Tensor:
        return every[me]

    def total(every: Sequence[Tensor]) -> Tensor:
        return sum(every[1:], every[0])

    def joined(dim: int) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda every: torch.cat(list(every), dim)

    def own_part(dim: int) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda every: part(every[me], dim, size, me)

    def part_of_total(dim: int) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda every: part(total(every), dim, size, me)

    found = {
        "copy": Pair(lambda x: copy_to_group(x, group), (3, 5), None, None, own, total),
        "reduce": Pair(lambda x: reduce_from_group(x, group), (3, 5), None, None, total, own),
    }
    for width in (5, 7, 12):  # over 4: 2 2 1 0 and 2 2 2 1; over 3: 2 2 1 and 3 3 1
        found[f"scatter of {width}"] = Pair(lambda x: scatter_to_group(x, group), (2, 3, width), None, -1, own_part(-1), joined(-1))
        found[f"gather of {width}"] = Pair(
            lambda x, w=width: gather_from_group(x, group, size=w), (2, 3, width), -1, None, joined(-1), own_part(-1)
        )
    found["gather of rows"] = Pair(lambda x: gather_from_group(x, group, 0), (12, 3), 0, None, joined(0), own_part(0))
    sequence = (2, 12, 3)
    found |= {
        "scatter to sequence": Pair(lambda x: scatter_to_sequence(x, group), sequence, None, 1, own_part(1), joined(1)),
        "gather from sequence": Pair(lambda x: gather_from_sequence(x, group, False), sequence, 1, None, joined(1), own_part(1)),
        "gather into split layers": Pair(lambda x: gather_from_sequence(x, group, True), sequence, 1, None, joined(1), part_of_total(1)),
        "reduce-scatter": Pair(lambda x: reduce_scatter_to_sequence(x, group), sequence, None, 1, part_of_total(1), joined(1)),
    }
    return found


@on_ranks()
def test_forward_and_backward_are_those_of_the_formulas(mesh: Mesh) -> None:
    for name, pair in pairs(mesh).items():
        for strides, lay_out in strides_of(mesh.tp_rank).items():
            check_formulas(mesh, pair, lay_out, f"{name}, {strides}")


def check_formulas(mesh: Mesh, pair: Pair, lay_out: Callable[[Tensor], Tensor], label: str) -> None:
    size, me = mesh.tp_size, mesh.tp_rank
    every_x = [lay_out(part(random(*pair.whole, seed=10 + i), pair.in_dim, size, i)) for i in range(size)]
    every_gradient = [lay_out(part(random(*pair.whole, seed=20 + i), pair.out_dim, size, i)) for i in range(size)]
    x, gradient = every_x[me].detach().requires_grad_(), every_gradient[me]
    kept_x, kept_gradient = x.detach().clone(), gradient.clone()
    y = pair.call(x)
    assert_close(y, pair.forward(every_x), msg=lambda text: f"{label}, forward: {text}")
    (x_gradient,) = torch.autograd.grad(y, x, gradient)
    assert_close(x_gradient, pair.backward(every_gradient), msg=lambda text: f"{label}, backward: {text}")
    assert torch.equal(x, kept_x), f"{label}: the caller's input changed"
    assert torch.equal(gradient, kept_gradient), f"{label}: the incoming gradient changed"


@on_ranks(*SPLIT)
def test_outputs_own_their_memory(mesh: Mesh) -> None:
    """All but copy's, which is the input itself: a part does not keep the whole alive, and to write into it changes no input."""
    for name, pair in pairs(mesh).items():
        x = part(random(*pair.whole, seed=1), pair.in_dim, mesh.tp_size, mesh.tp_rank).clone()
        kept, y = x.clone(), pair.call(x.requires_grad_()).detach()
        if name != "copy" and y.numel():
            assert y.untyped_storage().nbytes() == y.numel() * y.element_size(), name
            y.fill_(9)
        assert torch.equal(x, kept), name


@on_ranks()
def test_a_sum_s_own_gradient_is_one_number_expanded(mesh: Mesh) -> None:
    for name, pair in pairs(mesh).items():
        x = part(random(*pair.whole, seed=1), pair.in_dim, mesh.tp_size, mesh.tp_rank).clone().requires_grad_()
        pair.call(x).sum().backward()
        share = mesh.tp_size if name in ("copy", "gather into split layers") else 1  # each rank has used what it was handed
        assert_close(x.grad, torch.full_like(x, float(share)), msg=lambda text, n=name: f"{n}: {text}")


@on_ranks()
def test_copy_sums_the_gradients_of_all_ranks(mesh: Mesh) -> None:
    x = random(2, 3, seed=1).requires_grad_()
    (copy_to_group(x, mesh.tp_group) * (mesh.tp_rank + 1)).sum().backward()
    assert_close(x.grad, torch.full((2, 3), float(sum(range(1, mesh.tp_size + 1)))))


@on_ranks()
def test_reduce_does_not_reduce_again_in_backward(mesh: Mesh) -> None:
    """The gradient that comes is equal on all ranks and complete: another sum would make it tp times too large."""
    x = random(2, 3, seed=mesh.tp_rank).requires_grad_()
    y = reduce_from_group(x, mesh.tp_group)
    with collectives() as counted:
        y.backward(random(2, 3, seed=9))
    assert torch.equal(x.grad, random(2, 3, seed=9))
    assert counted == {}


@on_ranks()
def test_gather_from_sequence_sums_before_split_layers_and_splits_before_replicated_ones(mesh: Mesh) -> None:
    size, me = mesh.tp_size, mesh.tp_rank
    weights = [random(2, 12, 3, seed=i) for i in range(size)]
    for into_split_layers, expected in ((True, part(sum(weights), 1, size, me)), (False, part(weights[0], 1, size, me))):
        x = part(random(2, 12, 3, seed=5), 1, size, me).clone().requires_grad_()
        (gather_from_sequence(x, mesh.tp_group, into_split_layers) * weights[me if into_split_layers else 0]).sum().backward()
        assert_close(x.grad, expected)


@on_ranks()
def test_gradient_through_other_ranks_is_not_lost(mesh: Mesh) -> None:
    """Numeric gradients: x, equal on all ranks, is moved on all of them at once, and all that becomes of it everywhere counts."""
    group, size, me = mesh.tp_group, mesh.tp_size, mesh.tp_rank
    shares = [random(4, 3, seed=40 + i).double() for i in range(size)]

    def on_splits(x: Tensor) -> Tensor:
        return reduce_from_group(torch.tanh(copy_to_group(x, group) @ shares[me]), group)

    x = random(2, 4, seed=50).double().requires_grad_()
    assert torch.autograd.gradcheck(on_splits, (x,))
    assert_close(on_splits(x), sum(torch.tanh(x @ share) for share in shares))


@on_ranks()
def test_scatter_and_gather_pass_numeric_gradient_checks(mesh: Mesh) -> None:
    group, size, me = mesh.tp_group, mesh.tp_size, mesh.tp_rank
    for width in (4, 5, 7):
        weights = random(2, width, seed=60).double()
        mine = part(weights, -1, size, me)

        def there_and_back(x: Tensor, mine: Tensor = mine, width: int = width) -> Tensor:
            y = gather_from_group(torch.tanh(scatter_to_group(x, group)) * mine, group, size=width)
            return y * y.sum()

        if size == 1 or width % size:
            x = random(width, 2, seed=50).double().t().requires_grad_()  # not contiguous
            y = torch.tanh(x) * weights
            assert_close(there_and_back(x), y * y.sum())
            assert torch.autograd.gradcheck(there_and_back, (x,)), width


@on_ranks()
def test_sequence_functions_pass_numeric_gradient_checks(mesh: Mesh) -> None:
    """A sequence-parallel block: scatter, gather, split work, reduce-scatter, replicated work on a gathered sequence."""
    group, size, me = mesh.tp_group, mesh.tp_size, mesh.tp_rank
    length = 4 if size != 3 else 3
    shares = [random(2, 2, seed=70 + i).double() for i in range(size)]

    def block(x: Tensor) -> Tensor:
        mine = torch.tanh(scatter_to_sequence(x, group))
        mine = reduce_scatter_to_sequence(torch.tanh(gather_from_sequence(mine, group, True) @ shares[me]), group) + mine
        whole = gather_from_sequence(mine, group, False)
        return whole * whole.sum()

    def serial(x: Tensor) -> Tensor:
        x = torch.tanh(x)
        whole = sum(torch.tanh(x @ share) for share in shares) + x
        return whole * whole.sum()

    def copied(x: Tensor) -> Tensor:  # the same from a whole x: reduce-scatter's backward gathers
        mine = reduce_scatter_to_sequence(torch.tanh(copy_to_group(x, group) @ shares[me]), group)
        return gather_from_sequence(torch.tanh(mine), group, False)

    x = random(2, length, 1, seed=80).double().transpose(0, 2).expand(1, length, 2).contiguous().requires_grad_()
    assert_close(block(x), serial(x))
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradcheck(copied, (x,))


@on_ranks()
def test_each_communicates_once_in_the_directions_it_says(mesh: Mesh) -> None:
    others = mesh.tp_size - 1
    all_reduce, exchange = ({"allreduce": 1}, {"send": others, "recv_": others}) if others else ({}, {})
    expected = {
        "copy": ({}, all_reduce), "reduce": (all_reduce, {}), "scatter of 12": ({}, exchange), "gather of 12": (exchange, {}),
        "scatter to sequence": ({}, exchange), "gather from sequence": (exchange, {}),
        "gather into split layers": (exchange, exchange), "reduce-scatter": (exchange, exchange),
    }  # fmt: skip
    for name, (forward, backward) in expected.items():
        pair = pairs(mesh)[name]
        x = part(random(*pair.whole, seed=1), pair.in_dim, mesh.tp_size, mesh.tp_rank).clone().requires_grad_()
        with collectives() as counted:
            y = pair.call(x)
        assert messages(counted) == messages(forward), f"{name} forward: {counted}"
        with collectives() as counted:
            y.sum().backward()
        assert messages(counted) == messages(backward), f"{name} backward: {counted}"


def messages(counted: dict[str, int]) -> dict[str, int]:
    return {name.rstrip("_"): count for name, count in counted.items()}
