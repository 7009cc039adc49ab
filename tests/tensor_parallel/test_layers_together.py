"""Layers that share an input or follow each other: against their serial twins, and how often they communicate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tensor_parallel.support import CPU, check_gradients, collectives, load, on_ranks, order_of_linear, part, random, serial_linear
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, SharedColumnLinear, fan_out
from tptrain.tensor_parallel.parameter import local_part

MICRO_BATCHES, SEQUENCE = 3, 12


@on_ranks()
def test_fan_out_is_its_twins_with_one_collective_a_direction(mesh: Mesh) -> None:
    """q, k and v of one input; forward one gather (sequence parallelism alone), backward one sum of their input gradients."""
    size, me = mesh.tp_size, mesh.tp_rank
    for sequence_parallel in (False, True):
        twins = [serial_linear(6, outputs, bias, seed=10 * outputs) for outputs, bias in ((8, True), (5, False), (3, True))]
        layers = [
            ColumnParallelLinear(6, 8, True, mesh.tp, CPU, sequence_parallel=sequence_parallel),
            ColumnParallelLinear(6, 5, False, mesh.tp, CPU, sequence_parallel=sequence_parallel),
            SharedColumnLinear(6, 3, 1, True, mesh.tp, CPU, sequence_parallel=sequence_parallel),
        ]
        for layer, twin in zip(layers, twins, strict=True):
            load(layer, twin)
        for i in range(MICRO_BATCHES):
            whole = random(2, SEQUENCE, 6, seed=i)
            dim = 1 if sequence_parallel else None
            x, twin_x = part(whole, dim, size, me).clone().requires_grad_(), whole.clone().requires_grad_()
            with order_of_linear() as forward:
                ours = fan_out(x, layers)
            theirs = [twin(twin_x) for twin in twins]
            uses = [random(2, SEQUENCE, 3, seed=50 + rank) for rank in range(size)]  # of the shared block
            gradients = [random(2, SEQUENCE, 8, seed=60), random(2, SEQUENCE, 5, seed=61)]
            mine = [*(part(gradient, -1, size, me) for gradient in gradients), uses[me]]
            expected = [*(part(y, -1, size, me) for y in theirs[:2]), theirs[2]]
            for y, wanted in zip(ours, expected, strict=True):
                assert_close(y, wanted, rtol=1e-5, atol=1e-5)
            with order_of_linear() as backward:
                torch.autograd.backward(ours, mine)
            torch.autograd.backward(theirs, [*gradients, sum(uses)])
            assert_close(x.grad, part(twin_x.grad, dim, size, me), rtol=1e-5, atol=2e-5)
            if size == 1:
                assert started(forward) == started(backward) == []
            else:
                assert started(forward) == (["all_gather"] if sequence_parallel else [])
                assert started(backward) == (["all_gather", "reduce_scatter"] if sequence_parallel else ["all_reduce"])
        for layer, twin in zip(layers, twins, strict=True):
            check_gradients(layer, twin, mesh.tp_group)


def started(events: list[str]) -> list[str]:
    return [event.removeprefix("start ") for event in events if event.startswith("start ")]


@on_ranks()
def test_an_output_that_nobody_uses_costs_nothing(mesh: Mesh) -> None:
    layers = [ColumnParallelLinear(6, 8, True, mesh.tp, CPU) for _ in range(2)]
    for layer in layers:
        load(layer, serial_linear(6, 8, True))
    twin, x = serial_linear(6, 8, True), random(4, 6, seed=3).requires_grad_()
    twin_x, gradient = random(4, 6, seed=3).requires_grad_(), random(4, 8, seed=4)
    fan_out(x, layers)[1].backward(part(gradient, -1, mesh.tp_size, mesh.tp_rank))
    twin(twin_x).backward(gradient)
    assert_close(x.grad, twin_x.grad)
    check_gradients(layers[1], twin, mesh.tp_group)
    assert layers[0].weight.grad is None or (local_part(layers[0].weight.grad) == 0).all()


@on_ranks()
def test_column_then_row_communicates_once_a_direction(mesh: Mesh) -> None:
    """A split MLP: nothing is communicated between the two layers. With sequence parallelism a gather before the first and a
    reduce-scatter after the last; backward the same and the gather of x once more."""
    size, me = mesh.tp_size, mesh.tp_rank
    for sequence_parallel in (False, True):
        twins = serial_linear(6, 8, True), serial_linear(8, 6, True)
        layers = (
            ColumnParallelLinear(6, 8, True, mesh.tp, CPU, sequence_parallel=sequence_parallel),
            RowParallelLinear(8, 6, True, mesh.tp, CPU, sequence_parallel=sequence_parallel),
        )
        for layer, twin in zip(layers, twins, strict=True):
            load(layer, twin)

        def run(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
            return down(F.gelu(up(x)))

        dim, whole, gradient = 1 if sequence_parallel else None, random(2, SEQUENCE, 6, seed=1) / 4, random(2, SEQUENCE, 6, seed=2)
        x, twin_x = part(whole, dim, size, me).clone().requires_grad_(), whole.clone().requires_grad_()
        with order_of_linear() as forward, collectives() as counted_forward:
            y = run(*layers, x)
        expected = run(*twins, twin_x)
        assert_close(y, part(expected, dim, size, me), rtol=1e-5, atol=1e-5)
        with order_of_linear() as backward, collectives() as counted_backward:
            y.backward(part(gradient, dim, size, me))
        expected.backward(gradient)
        assert_close(x.grad, part(twin_x.grad, dim, size, me), rtol=1e-5, atol=2e-5)
        for layer, twin in zip(layers, twins, strict=True):
            check_gradients(layer, twin, mesh.tp_group)
        if mesh.tp_size == 1:
            assert counted_forward == counted_backward == {}
        elif not sequence_parallel:
            assert counted_forward == counted_backward == {"allreduce": 1}
        else:
            assert started(forward) == ["all_gather", "reduce_scatter"]
            assert started(backward) == ["all_gather", "all_gather", "reduce_scatter"]
