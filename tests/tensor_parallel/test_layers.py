"""Each split layer against its serial twin from torch.nn: output, input gradient, every parameter's gradient, over three
micro-batches whose gradients add up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tensor_parallel.support import (
    CPU,
    check_gradients,
    fill,
    load,
    on_ranks,
    part,
    random,
    serial_linear,
    strides_of,
)
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.communication import all_reduce
from tptrain.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedColumnLinear,
)
from tptrain.tensor_parallel.parameter import local_part, partial_gradients

MICRO_BATCHES, SEQUENCE = 3, 12


class Batches:
    """Whole inputs and whole output gradients of three micro-batches, and this rank's parts of them along a dimension."""

    def __init__(self, mesh: Mesh, inputs: int, outputs: int, lay_out: Callable[[Tensor], Tensor] = Tensor.clone) -> None:
        self.size, self.me = mesh.tp_size, mesh.tp_rank
        self.x = [lay_out(random(2, SEQUENCE, inputs, seed=30 + i)) for i in range(MICRO_BATCHES)]
        self.gradients = [lay_out(random(2, SEQUENCE, outputs, seed=40 + i)) for i in range(MICRO_BATCHES)]

    def part(self, whole: Tensor, dim: int | None) -> Tensor:
        return part(whole, dim, self.size, self.me)


def check_linear(layer: nn.Module, twin: nn.Linear, batches: Batches, x_dim: int | None, y_dim: int | None) -> None:
    """The layer is its twin, where this rank holds its part of x along x_dim and of y along y_dim (None: all of it)."""
    load(layer, twin)
    for whole_x, whole_gradient_of_y in zip(batches.x, batches.gradients, strict=True):
        x = batches.part(whole_x, x_dim).detach().requires_grad_()
        twin_x = whole_x.detach().clone().requires_grad_()
        kept, gradient = x.detach().clone(), batches.part(whole_gradient_of_y, y_dim)
        kept_gradient = gradient.clone()
        y, expected = layer(x), twin(twin_x)
        assert_close(y, batches.part(expected, y_dim), rtol=1e-5, atol=1e-5)
        y.backward(gradient)
        expected.backward(whole_gradient_of_y)
        assert_close(x.grad, batches.part(twin_x.grad, x_dim), rtol=1e-5, atol=2e-5)
        assert torch.equal(x, kept), "the input changed"
        assert torch.equal(gradient, kept_gradient), "the incoming gradient changed"


# ---- column ------------------------------------------------------------------------------------------------


@on_ranks()
def test_column_is_its_twin(mesh: Mesh) -> None:
    for outputs, bias, gather_output, sequence_parallel in product((8, 5), (True, False), (True, False), (True, False)):
        twin = serial_linear(6, outputs, bias)
        layer = ColumnParallelLinear(
            6, outputs, bias, mesh.tp, CPU, gather_output=gather_output, sequence_parallel=sequence_parallel
        )  # fmt: skip
        check_linear(layer, twin, Batches(mesh, 6, outputs), 1 if sequence_parallel else None, None if gather_output else -1)
        assert partial_gradients(layer) == []
        check_gradients(layer, twin, mesh.tp_group)
        assert layer.row_start == sum(part(torch.arange(outputs), 0, mesh.tp_size, i).numel() for i in range(mesh.tp_rank))


@on_ranks("tp1", "tp3", "tp4")
def test_layers_take_any_strides(mesh: Mesh) -> None:
    for lay_out, sequence_parallel in product(strides_of(mesh.tp_rank).values(), (False, True)):
        sequence = 1 if sequence_parallel else None
        for layer_type, x_dim, y_dim in ((ColumnParallelLinear, sequence, -1), (RowParallelLinear, -1, sequence)):
            twin = serial_linear(12, 12, True)
            layer = layer_type(12, 12, True, mesh.tp, CPU, sequence_parallel=sequence_parallel)
            check_linear(layer, twin, Batches(mesh, 12, 12, lay_out), x_dim, y_dim)
            check_gradients(layer, twin, mesh.tp_group)


@on_ranks()
def test_split_weights_gradients_are_neither_averaged_nor_summed_over_tp(mesh: Mesh) -> None:
    """Each rank's rows have their gradient from that rank alone: the input times this rank's gradients, by formula."""
    layer = ColumnParallelLinear(6, 8, True, mesh.tp, CPU)
    fill(layer.weight, random(8, 6, seed=1))
    fill(layer.bias, random(8, seed=2))
    x, gradient = random(4, 6, seed=3), part(random(4, 8, seed=4), -1, mesh.tp_size, mesh.tp_rank)
    layer(x.clone().requires_grad_()).backward(gradient)
    assert_close(local_part(layer.weight.grad), gradient.t() @ x)
    assert_close(local_part(layer.bias.grad), gradient.sum(0))
    assert partial_gradients(layer) == [], "complete: the step sums nothing"


# ---- shared ------------------------------------------------------------------------------------------------


@on_ranks()
def test_shared_key_value_gradients_sum_over_tp(mesh: Mesh) -> None:
    """Fewer blocks than ranks: each rank's gradient is what its own use of the block gives, and their sum is the twin's."""
    size, me, group = mesh.tp_size, mesh.tp_rank, mesh.tp_group
    for blocks, bias, sequence_parallel in product({1, 2 if size == 4 else 1}, (True, False), (True, False)):
        width = 3
        twin = serial_linear(6, width * blocks, bias)
        layer = SharedColumnLinear(6, width * blocks, blocks, bias, mesh.tp, CPU, sequence_parallel=sequence_parallel)
        load(layer, twin)
        rows = [slice(width * (rank * blocks // size), width * (rank * blocks // size + 1)) for rank in range(size)]
        assert layer.row_start == rows[me].start
        batches = Batches(mesh, 6, width)
        dim = 1 if sequence_parallel else None
        for i, whole in enumerate(batches.x):
            uses = [random(2, SEQUENCE, width, seed=100 * i + rank) for rank in range(size)]  # of one block, by different ranks
            x, twin_x = batches.part(whole, dim).clone().requires_grad_(), whole.clone().requires_grad_()
            y, expected = layer(x), twin(twin_x)
            assert_close(y, expected[..., rows[me]], rtol=1e-5, atol=1e-5)
            y.backward(uses[me])
            sum((expected[..., rows[rank]] * uses[rank]).sum() for rank in range(size)).backward()
            assert_close(x.grad, batches.part(twin_x.grad, dim), rtol=1e-5, atol=2e-5)
        outside = torch.ones(width * blocks, dtype=torch.bool)
        outside[rows[me]] = False
        assert (local_part(layer.weight.grad)[outside] == 0).all(), "rows of other blocks have no gradient here"
        assert len(partial_gradients(layer)) == (2 if bias else 1)
        check_gradients(layer, twin, group)


@on_ranks()
def test_shared_blocks_must_divide_tp(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=f"{mesh.tp_size + 1} blocks .* tp={mesh.tp_size}"):
        SharedColumnLinear(6, 3 * (mesh.tp_size + 1), mesh.tp_size + 1, False, mesh.tp, CPU)


# ---- row ---------------------------------------------------------------------------------------------------


@on_ranks()
def test_row_is_its_twin(mesh: Mesh) -> None:
    for inputs, bias, (input_is_parallel, sequence_parallel) in product(
        (8, 5), (True, False), ((True, False), (True, True), (False, False))
    ):  # fmt: skip
        twin = serial_linear(inputs, 6, bias)
        layer = RowParallelLinear(
            inputs, 6, bias, mesh.tp, CPU, input_is_parallel=input_is_parallel, sequence_parallel=sequence_parallel
        )  # fmt: skip
        check_linear(layer, twin, Batches(mesh, inputs, 6), -1 if input_is_parallel else None, 1 if sequence_parallel else None)
        check_gradients(layer, twin, mesh.tp_group)


@on_ranks("tp1", "tp2")
def test_row_layer_refuses_an_unsplit_input_under_sequence_parallelism(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="sequence_parallel needs input_is_parallel"):
        RowParallelLinear(8, 6, True, mesh.tp, CPU, input_is_parallel=False, sequence_parallel=True)


@on_ranks()
def test_row_bias_counts_once(mesh: Mesh) -> None:
    """With nothing but a bias, the row layer's output is that bias on every rank, and its gradient the incoming one's sum."""
    layer = RowParallelLinear(8, 6, True, mesh.tp, CPU)
    fill(layer.weight, torch.zeros(6, 8))
    fill(layer.bias, random(6, seed=1))
    y = layer(part(random(4, 8, seed=2), -1, mesh.tp_size, mesh.tp_rank))
    assert_close(y, random(6, seed=1).expand(4, 6))
    y.backward(random(4, 6, seed=3))
    assert_close(local_part(layer.bias.grad), random(4, 6, seed=3).sum(0))
    assert partial_gradients(layer) == [], "complete on every rank: a sum over tp would count it tp times"


@on_ranks()
def test_row_bias_under_sequence_parallelism_is_summed_over_tp_once(mesh: Mesh) -> None:
    """Each rank sees its run of the sequence: its bias gradient is that run's, and the sum over tp is the whole one."""
    layer = RowParallelLinear(8, 6, True, mesh.tp, CPU, sequence_parallel=True)
    fill(layer.weight, random(6, 8, seed=1))
    fill(layer.bias, random(6, seed=2))
    whole = random(2, SEQUENCE, 6, seed=4)
    gradient = part(whole, 1, mesh.tp_size, mesh.tp_rank)
    layer(part(random(2, SEQUENCE, 8, seed=3), -1, mesh.tp_size, mesh.tp_rank)).backward(gradient)
    assert_close(local_part(layer.bias.grad), gradient.sum((0, 1)))
    (partial,) = partial_gradients(layer)
    assert partial.data_ptr() == local_part(layer.bias.grad).data_ptr()
    assert_close(all_reduce(partial, mesh.tp_group), whole.sum((0, 1)))
