"""The label of a parameter, and gradients that accumulate in it as plain autograd's would."""

from __future__ import annotations

from itertools import product

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from tests.tensor_parallel.support import CPU, collectives, fill, on_ranks, part, random, whole_gradient
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.communication import all_reduce_flat
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tptrain.tensor_parallel.parameter import (
    LabelledModule,
    add_gradient,
    add_product,
    compute_in,
    drop_copies,
    labelled_parameter,
    local_part,
    partial_gradients,
)


@on_ranks()
def test_the_split_is_dtensor_s_own(mesh: Mesh) -> None:
    """The split is DTensor's own, so that whatever reads the label (checkpoints, norms) finds the right rows."""
    for shape, dim in (((257, 3), 0), ((5, 3), 0), ((3, 6), 1), ((2, 7), 1), ((9,), 0), ((4, 5), None), ((3,), None)):
        whole = random(*shape, seed=1)
        parameter = labelled_parameter(shape, dim, mesh.tp, CPU)
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(parameter.data, DTensor)
        assert parameter.placements == ((Replicate() if dim is None else Shard(dim)),)
        assert parameter.shape == whole.shape
        assert parameter.stride() == whole.stride()
        assert parameter.dtype == torch.float32
        expected = distribute_tensor(whole, mesh.tp, [Replicate() if dim is None else Shard(dim)]).to_local()
        assert parameter.to_local().shape == expected.shape, "more or less than this rank's part is allocated"
        fill(parameter, whole)
        assert torch.equal(parameter.to_local(), expected)
        assert torch.equal(parameter.detach().full_tensor(), whole)


@on_ranks()
def test_parts_share_the_parameter_s_memory(mesh: Mesh) -> None:
    layer = ColumnParallelLinear(3, 8, False, mesh.tp, CPU)
    parameter = layer.weight
    fill(parameter, random(8, 3, seed=2))
    mine = part(random(8, 3, seed=2), 0, mesh.tp_size, mesh.tp_rank)
    with torch.no_grad():
        without_graph = layer.part("weight")
    for view in (layer.part("weight"), without_graph, layer.values("weight"), local_part(parameter)):
        assert not isinstance(view, DTensor)
        assert_close(view.detach(), mine)
        assert view.data_ptr() == parameter.to_local().data_ptr(), "not the parameter's own memory"
    assert layer.part("weight").requires_grad
    assert not without_graph.requires_grad
    assert not local_part(parameter).requires_grad
    plain = torch.ones(2, requires_grad=True)
    assert local_part(plain).data_ptr() == plain.data_ptr()
    assert not local_part(plain).requires_grad


@on_ranks()
def test_bf16_values_are_copied_once_and_gradients_add_up_in_fp32(mesh: Mesh) -> None:
    """Values in bf16, copied once for all micro-batches; gradients in fp32, added in fp32."""
    layer = RowParallelLinear(8, 6, True, mesh.tp, CPU)
    fill(layer.weight, random(6, 8, seed=1))
    fill(layer.bias, random(6, seed=2))
    fp32_part = layer.part("weight")
    assert fp32_part.data_ptr() == layer.weight.to_local().data_ptr(), "fp32 needs no copy"
    compute_in(nn.Sequential(layer), torch.bfloat16)
    x = part(random(2, 8, seed=3).bfloat16(), -1, mesh.tp_size, mesh.tp_rank)
    assert layer(x).dtype == torch.bfloat16
    assert layer.part("weight").data_ptr() == layer.part("weight").data_ptr()
    assert torch.equal(layer.part("weight"), layer.weight.to_local().bfloat16())
    for calls in (1, 2, 3):  # three times a number of 8 bits takes 10 bits
        layer(x).backward(random(2, 6, seed=4).bfloat16())
        if calls == 1:
            once = [parameter.grad.to_local().clone() for parameter in layer.parameters()]
    for parameter, first in zip(layer.parameters(), once, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad.to_local(), 3 * first)
    fill(layer.weight, random(6, 8, seed=5))
    drop_copies(nn.Sequential(layer))
    assert torch.equal(layer.part("weight"), layer.weight.to_local().bfloat16()), "an old copy is used"


@on_ranks()
def test_gradients_of_one_use_and_many_add_up(mesh: Mesh) -> None:
    """Parameters used three times in a graph, in two backward calls, before and after gradients are cleared."""
    tp, cpu, hidden = mesh.tp, CPU, 8
    column, row = ColumnParallelLinear(hidden, 12, True, tp, cpu), RowParallelLinear(12, hidden, True, tp, cpu)
    table = VocabParallelEmbedding(11, hidden, tp, cpu)
    twins = nn.Linear(hidden, 12), nn.Linear(12, hidden), nn.Embedding(11, hidden)
    pairs = [
        (ours, theirs)
        for layer, twin in zip((column, row, table), twins, strict=True)
        for (name, ours), (twin_name, theirs) in zip(layer.named_parameters(), twin.named_parameters(), strict=True)
        if name == twin_name
    ]
    assert len(pairs) == 5
    for i, (ours, theirs) in enumerate(pairs):
        theirs.data = random(*theirs.shape, seed=100 + i) / 2
        fill(ours, theirs.data)

    def run(layers, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        column, row, table = layers
        x = table(tokens)
        for _ in range(3):
            x = x + row(torch.tanh(column(x)))
        return ((x + table(tokens.flip(0))) * weight).sum()

    for round_ in range(2):
        for call in range(3):
            tokens = torch.randint(11, (2, 3), generator=torch.Generator().manual_seed(call))
            weight = random(2, 3, hidden, seed=10 * round_ + call)
            ours, theirs = run((column, row, table), tokens, weight), run(twins, tokens, weight)
            assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            ours.backward()
            theirs.backward()
            for mine, twin in pairs:
                assert_close(whole_gradient(mine), twin.grad, rtol=1e-5, atol=1e-4)
        for layer in (column, row, table, *twins):
            layer.zero_grad()
        assert all(mine.grad is None for mine, _ in pairs)


@on_ranks()
def test_no_gradient_is_shared(mesh: Mesh) -> None:
    """With one token, the gradient of a bias may be the very tensor that flows on: adding to it must not change that one."""
    cases = [(ColumnParallelLinear, 6, 8), (RowParallelLinear, 8, 6)]
    for (layer_type, inputs, outputs), leading in product(cases, [(1, 1), ()]):
        layer = layer_type(inputs, outputs, True, mesh.tp, CPU)
        fill(layer.weight, random(outputs, inputs, seed=3))
        fill(layer.bias, random(outputs, seed=4))
        row = layer_type is RowParallelLinear
        x = part(random(*leading, inputs, seed=5), -1 if row else None, mesh.tp_size, mesh.tp_rank).clone().requires_grad_()
        y = layer(x)
        y.retain_grad()
        incoming = random(*y.shape, seed=6)
        y.backward(incoming)
        kept = [incoming.clone(), y.grad.clone(), x.grad.clone()]
        for parameter in (layer.weight, layer.bias):
            parameter.grad.to_local().add_(1)
        for tensor, value in zip((incoming, y.grad, x.grad), kept, strict=True):
            assert torch.equal(tensor, value), f"{layer_type.__name__}: a parameter's gradient shares memory with one that flows on"


@on_ranks("tp2")
def test_counting_sees_dtensor_s_own_collectives(mesh: Mesh) -> None:
    """The counter that other tests trust: a gather that DTensor does by itself is counted."""
    with collectives() as counted:
        labelled_parameter((4, 2), 0, mesh.tp, CPU).full_tensor()
    assert sum(counted.values()) > 0


class Scale(LabelledModule):
    """What a norm is to tp: a replicated weight whose gradient each rank makes from the tokens it sees."""

    def __init__(self, size: int, mesh: Mesh, partial: bool) -> None:
        super().__init__()
        self.weight = labelled_parameter((size,), None, mesh.tp, CPU)
        self.bias = labelled_parameter((size,), None, mesh.tp, CPU)
        if partial:
            self.partial_gradients = ("weight", "bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.part("weight") + self.bias_part()


@on_ranks()
def test_replicated_weights_of_split_sequences_are_summed_over_tp_once(mesh: Mesh) -> None:
    """A norm of a run of the sequence, after a row layer with a bias: their gradients are parts, all of them and no others."""
    size, me = mesh.tp_size, mesh.tp_rank
    whole, gradient = random(2, 12, 8, seed=1), random(2, 12, 6, seed=2)
    for split in (True, False):
        row = RowParallelLinear(8, 6, True, mesh.tp, CPU, sequence_parallel=split)
        norm = Scale(6, mesh, partial=split)
        twin = nn.Linear(8, 6)
        twin_weight, twin_bias = random(6, seed=5).requires_grad_(), random(6, seed=6).requires_grad_()
        twin.weight.data, twin.bias.data = random(6, 8, seed=3), random(6, seed=4)
        for ours, theirs in zip((*row.parameters(), *norm.parameters()), (*twin.parameters(), twin_weight, twin_bias), strict=True):
            fill(ours, theirs.detach())
        dim = 1 if split else None
        for _ in range(2):
            norm(row(part(whole, -1, size, me))).backward(part(gradient, dim, size, me))
            (twin(whole) * twin_weight + twin_bias).backward(gradient)
        partial = partial_gradients(nn.Sequential(row, norm))
        expected = [row.bias, norm.weight, norm.bias] if split else []
        assert [tensor.data_ptr() for tensor in partial] == [local_part(parameter.grad).data_ptr() for parameter in expected]
        all_reduce_flat(partial, mesh.tp_group)
        for ours, theirs in ((row.bias, twin.bias), (norm.weight, twin_weight), (norm.bias, twin_bias)):
            assert_close(local_part(ours.grad), theirs.grad, rtol=1e-5, atol=2e-5)
        assert_close(whole_gradient(row.weight), twin.weight.grad, rtol=1e-5, atol=2e-5)


@on_ranks("tp2")
def test_gradients_that_do_not_exist_yet_are_not_summed(mesh: Mesh) -> None:
    layers = nn.Sequential(Scale(3, mesh, True), Scale(4, mesh, True))
    assert partial_gradients(layers) == []
    fill(layers[1].weight, random(4, seed=1))
    fill(layers[1].bias, random(4, seed=2))
    layers[1](random(2, 4, seed=3)).sum().backward()
    assert [gradient.shape for gradient in partial_gradients(layers)] == [(4,), (4,)]


@on_ranks("tp1", "tp2")
def test_gradients_of_some_rows_leave_the_others_alone(mesh: Mesh) -> None:
    """`rows` of a product and of a vector: the first use makes zeros elsewhere, in the parameter's own memory ever after."""
    for gradient_dtype in (torch.float32, torch.bfloat16):
        weight, bias = labelled_parameter((5, 3), None, mesh.tp, CPU), labelled_parameter((5,), None, mesh.tp, CPU)
        expected, expected_bias = torch.zeros(5, 3), torch.zeros(5)
        for i, rows in enumerate((slice(1, 3), slice(3, 5), slice(1, 3), slice(0, 2))):
            y_grad, x = random(4, 2, seed=i).to(gradient_dtype), random(4, 3, seed=10 + i).to(gradient_dtype)
            kept = y_grad.clone(), x.clone()
            add_product(weight, y_grad, x, rows)
            add_gradient(bias, y_grad.sum(0), rows)
            expected[rows] += y_grad.t() @ x
            expected_bias[rows] += y_grad.sum(0)
            assert torch.equal(y_grad, kept[0])
            assert torch.equal(x, kept[1])
        assert_close(local_part(weight.grad), expected)
        assert_close(local_part(bias.grad), expected_bias)
        assert weight.grad.dtype == torch.float32
