"""Each split layer against its serial twin from torch.nn: output, input gradient, every parameter's gradient, over three
micro-batches whose gradients add up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tensor_parallel.support import (
    CPU,
    SPLIT,
    check_gradients,
    collectives,
    fill,
    load,
    on_ranks,
    order_of_linear,
    part,
    random,
    serial_linear,
    strides_of,
    whole_gradient,
)
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.communication import all_reduce
from tptrain.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedColumnLinear,
    VocabParallelEmbedding,
    fan_out,
    head_of,
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


# ---- embedding ---------------------------------------------------------------------------------------------


@on_ranks()
def test_embedding_of_a_vocabulary_that_tp_does_not_divide_is_its_twin(mesh: Mesh) -> None:
    for vocabulary, sequence_parallel in product((257, 5, 4), (True, False)):
        twin = nn.Embedding(vocabulary, 6)
        twin.weight.data = random(vocabulary, 6, seed=1)
        layer = VocabParallelEmbedding(vocabulary, 6, mesh.tp, CPU, sequence_parallel=sequence_parallel)
        load(layer, twin)
        dim = 1 if sequence_parallel else None
        batches = Batches(mesh, 1, 6)
        for i, gradient in enumerate(batches.gradients):
            tokens = torch.randint(vocabulary, (2, SEQUENCE), generator=torch.Generator().manual_seed(i))  # some of them twice
            tokens[0, :3] = torch.tensor([0, vocabulary - 1, vocabulary // 2])
            tokens[1] = tokens[0].flip(0)
            kept = tokens.clone()
            y, expected = layer(tokens), twin(tokens)
            assert_close(y, batches.part(expected, dim))
            y.backward(batches.part(gradient, dim))
            expected.backward(gradient)
            assert torch.equal(tokens, kept)
        check_gradients(layer, twin, mesh.tp_group)
        assert partial_gradients(layer) == []


@on_ranks()
def test_every_token_has_one_owner(mesh: Mesh) -> None:
    """Over 4 ranks, 5 rows are 2, 2, 1 and none; a rank that owns nothing takes part all the same."""
    layer = VocabParallelEmbedding(5, 6, mesh.tp, CPU)
    if mesh.tp_size == 4:
        assert (layer.start, layer.stop) == [(0, 2), (2, 4), (4, 5), (5, 5)][mesh.tp_rank]
        assert local_part(layer.weight).shape == (layer.stop - layer.start, 6)
    fill(layer.weight, random(5, 6, seed=1))
    layer(torch.arange(5).view(1, 5)).sum().backward()
    assert_close(local_part(layer.weight.grad), torch.ones(layer.stop - layer.start, 6))
    assert_close(whole_gradient(layer.weight), torch.ones(5, 6))


@on_ranks("tp1")
def test_one_rank_refuses_tokens_outside_the_table(mesh: Mesh) -> None:
    layer = VocabParallelEmbedding(5, 6, mesh.tp, CPU)
    for token in (5, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([[token]]))


# ---- several layers ----------------------------------------------------------------------------------------


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

        dim, batches = 1 if sequence_parallel else None, Batches(mesh, 6, 6)
        x, twin_x = (batches.x[0] / 4).clone(), (batches.x[0] / 4).clone().requires_grad_()
        x = batches.part(x, dim).clone().requires_grad_()
        with order_of_linear() as forward, collectives() as counted_forward:
            y = run(*layers, x)
        expected = run(*twins, twin_x)
        assert_close(y, batches.part(expected, dim), rtol=1e-5, atol=1e-5)
        with order_of_linear() as backward, collectives() as counted_backward:
            y.backward(batches.part(batches.gradients[0], dim))
        expected.backward(batches.gradients[0])
        assert_close(x.grad, batches.part(twin_x.grad, dim), rtol=1e-5, atol=2e-5)
        for layer, twin in zip(layers, twins, strict=True):
            check_gradients(layer, twin, mesh.tp_group)
        if mesh.tp_size == 1:
            assert counted_forward == counted_backward == {}
        elif not sequence_parallel:
            assert counted_forward == counted_backward == {"allreduce": 1}
        else:
            assert started(forward) == ["all_gather", "reduce_scatter"]
            assert started(backward) == ["all_gather", "all_gather", "reduce_scatter"]


@on_ranks(*SPLIT)
def test_head_of_a_layer_is_its_part_of_the_weight(mesh: Mesh) -> None:
    for layer in (ColumnParallelLinear(6, 7, False, mesh.tp, CPU), VocabParallelEmbedding(7, 6, mesh.tp, CPU)):
        fill(layer.weight, random(7, 6, seed=1))
        head = head_of(layer)
        assert head.weight is layer.weight
        assert torch.equal(head.weight_values, part(random(7, 6, seed=1), 0, mesh.tp_size, mesh.tp_rank))
        assert head.bias is head.bias_values is head.rows is None
