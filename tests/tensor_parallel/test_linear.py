"""When the split linear layers communicate, what they keep for backward and what they allocate there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tensor_parallel.support import CPU, SPLIT, load, on_ranks, order_of_linear, part, random, results, serial_linear
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.communication import shard_bounds
from tptrain.tensor_parallel.deferral import Deferral
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, SharedColumnLinear, fan_out, head_of
from tptrain.tensor_parallel.linear import column_linears
from tptrain.tensor_parallel.parameter import local_part
from tptrain.tensor_parallel.scratch import Scratch

BATCH, SEQUENCE, INPUTS, OUTPUTS = 2, 12, 15, 36  # n = 24 tokens: no two of n, in/tp and out/tp are equal


@on_ranks(*SPLIT)
def test_input_gradient_travels_while_the_weight_gradient_is_computed(mesh: Mesh) -> None:
    size, me = mesh.tp_size, mesh.tp_rank
    layer = ColumnParallelLinear(INPUTS, OUTPUTS, True, mesh.tp, CPU)
    load(layer, serial_linear(INPUTS, OUTPUTS, True))
    start, stop = shard_bounds(OUTPUTS, size, me)
    for _ in range(2):  # the first makes the gradient, the second adds to it
        y = layer(random(BATCH, SEQUENCE, INPUTS, seed=1).requires_grad_())
        with order_of_linear() as events:
            y.backward(random(*y.shape, seed=2))
        assert events == [
            f"product [{BATCH * SEQUENCE}, {INPUTS}]",  # x's gradient
            "start all_reduce",
            f"product [{stop - start}, {INPUTS}]",  # the weight's
            "wait all_reduce",
        ]


@on_ranks(*SPLIT)
def test_sequence_parallel_gather_and_scatter_travel_under_products(mesh: Mesh) -> None:
    size, me = mesh.tp_size, mesh.tp_rank
    start, stop = shard_bounds(OUTPUTS, size, me)
    weight, x_gradient = f"product [{stop - start}, {INPUTS}]", f"product [{BATCH * SEQUENCE}, {INPUTS}]"
    layers = [ColumnParallelLinear(INPUTS, OUTPUTS, bias, mesh.tp, CPU, sequence_parallel=True) for bias in (True, False)]
    for layer, bias in zip(layers, (True, False), strict=True):
        load(layer, serial_linear(INPUTS, OUTPUTS, bias))
    outputs = fan_out(random(BATCH, SEQUENCE // size, INPUTS, seed=1).requires_grad_(), layers)
    with order_of_linear() as events:
        torch.autograd.backward(outputs, [random(*y.shape, seed=2) for y in outputs])
    assert events == [
        "start all_gather", x_gradient, x_gradient, "start reduce_scatter", "wait all_gather", weight, weight, "wait reduce_scatter",
    ]  # fmt: skip


@on_ranks(*SPLIT)
def test_no_input_gradient_travels_where_none_is_needed(mesh: Mesh) -> None:
    layer = ColumnParallelLinear(INPUTS, OUTPUTS, False, mesh.tp, CPU)
    load(layer, serial_linear(INPUTS, OUTPUTS, False))
    y = layer(random(4, INPUTS, seed=1))
    with order_of_linear() as events:
        y.backward(random(*y.shape, seed=2))
    assert [event for event in events if not event.startswith("product")] == []
    assert_close(local_part(layer.weight.grad), random(*y.shape, seed=2).t() @ random(4, INPUTS, seed=1))

    layer = ColumnParallelLinear(INPUTS, OUTPUTS, False, mesh.tp, CPU, sequence_parallel=True)
    load(layer, serial_linear(INPUTS, OUTPUTS, False))
    whole = random(BATCH, SEQUENCE, INPUTS, seed=1)
    y = layer(part(whole, 1, mesh.tp_size, mesh.tp_rank))
    with order_of_linear() as events:
        y.backward(random(*y.shape, seed=2))
    assert [event for event in events if not event.startswith("product")] == ["start all_gather", "wait all_gather"]  # of x, alone
    assert_close(local_part(layer.weight.grad), random(*y.shape, seed=2).flatten(0, 1).t() @ whole.flatten(0, 1), rtol=1e-5, atol=1e-5)


@on_ranks()
def test_weight_gradients_accumulate_in_place_without_a_temporary(mesh: Mesh) -> None:
    """The product is added to what is there by the operation that makes it: no other tensor of the weight's shape exists."""
    size, me = mesh.tp_size, mesh.tp_rank
    cases = [
        (ColumnParallelLinear(INPUTS, OUTPUTS, True, mesh.tp, CPU), INPUTS),
        (RowParallelLinear(OUTPUTS, INPUTS, True, mesh.tp, CPU), shard_bounds(OUTPUTS, size, me)),
        (SharedColumnLinear(INPUTS, 9, 1, True, mesh.tp, CPU), INPUTS),
    ]
    for layer, inputs in cases:
        width = inputs if isinstance(inputs, int) else inputs[1] - inputs[0]
        expected: Tensor | float = 0.0
        for call in range(3):
            x = random(BATCH, SEQUENCE, width, seed=10 + call).requires_grad_()
            y = layer(x)
            gradient = random(*y.shape, seed=20 + call)
            with results() as made:
                y.backward(gradient)
            expected += gradient.flatten(0, 1).t() @ x.detach().flatten(0, 1)
            total = local_part(layer.weight.grad)
            assert_close(total, expected, rtol=1e-5, atol=1e-5)
            if call == 0:
                place = total.data_ptr()
                continue
            assert total.data_ptr() == place, "another tensor took the gradient's place"
            ours = {place, local_part(layer.weight).data_ptr()}
            others = [name for name, tensor in made if tensor.shape == total.shape and tensor.data_ptr() not in ours]
            assert others == [], f"{type(layer).__name__} made tensors of the weight's shape by {others}"
            assert ("addmm_", total.shape) in [(name, tensor.shape) for name, tensor in made], "what this test watches for"


@on_ranks()
def test_backward_keeps_only_this_rank_s_part_of_the_input(mesh: Mesh) -> None:
    """Sequence parallelism gathers x again in backward rather than keep it; tensor parallelism keeps x itself, not a copy."""
    size = mesh.tp_size
    whole_x = BATCH * SEQUENCE * INPUTS * 4
    for sequence_parallel, expected in ((True, whole_x // size), (False, whole_x)):
        layers = [ColumnParallelLinear(INPUTS, OUTPUTS, True, mesh.tp, CPU, sequence_parallel=sequence_parallel) for _ in range(2)]
        length = SEQUENCE // size if sequence_parallel else SEQUENCE
        x = random(BATCH, length, INPUTS, seed=1).requires_grad_()
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, s=saved: s.append(tensor) or tensor, lambda tensor: tensor):
            fan_out(x, layers)
        assert sum(tensor.untyped_storage().nbytes() for tensor in saved) == expected
        assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]

        row = RowParallelLinear(OUTPUTS, INPUTS, True, mesh.tp, CPU, sequence_parallel=sequence_parallel)
        x = part(random(BATCH, SEQUENCE, OUTPUTS, seed=1), -1, size, mesh.tp_rank).clone().requires_grad_()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, s=saved: s.append(tensor) or tensor, lambda tensor: tensor):
            row(x)
        assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]


@on_ranks("tp1", "tp2")
def test_scratch_memory_is_used_again_and_not_too_early(mesh: Mesh) -> None:
    """Two micro-batches in flight have memory of their own, also while their weight gradients are put off; the next two use it again."""
    plain, ours = (ColumnParallelLinear(INPUTS, OUTPUTS, False, mesh.tp, CPU) for _ in range(2))
    for layer in (plain, ours):
        load(layer, serial_linear(INPUTS, OUTPUTS, False))
    scratch, deferral, places = Scratch(), Deferral(), []
    ours.deferral = deferral
    for seed in (1, 11):
        inputs = [random(4, INPUTS, seed=seed + m).requires_grad_() for m in range(2)]
        outputs = [column_linears(x, [head_of(ours, scratch)], ours.group, False)[0] for x in inputs]
        places.append({y.data_ptr() for y in outputs})
        put_off = []
        for m, y in enumerate(outputs):
            expected = plain(inputs[m].detach().requires_grad_())
            torch.testing.assert_close(y, expected)
            gradient = random(*y.shape, seed=100 + m)
            expected.backward(gradient)
            with deferral.putting_off() as work:
                y.backward(y.detach().copy_(gradient))  # as the loss leaves it: in the output's own memory
            put_off += work
        with torch.no_grad():
            for make in put_off:
                make()
        assert_close(local_part(ours.weight.grad), local_part(plain.weight.grad))
    assert len(places[0]) == 2
    assert places[0] == places[1]
