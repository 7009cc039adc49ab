"""The label of a parameter, and gradients that accumulate in it as plain autograd's would."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, fill, mesh_of, part, random, whole_gradient
from tptrain.tensor_parallel.communication import shard_bounds
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tptrain.tensor_parallel.parameter import compute_in, drop_copies, labelled_parameter, local_part


def test_shard_bounds_are_those_of_torch_chunk() -> None:
    for size in range(1, 60):
        for parts in range(1, 10):
            bounds = [shard_bounds(size, parts, i) for i in range(parts)]
            assert bounds[0][0] == 0
            assert bounds[-1][1] == size
            assert all(before[1] == after[0] for before, after in pairwise(bounds))
            chunks = [len(chunk) for chunk in torch.arange(size).chunk(parts)]
            assert [stop - start for start, stop in bounds] == chunks + [0] * (parts - len(chunks)), (size, parts)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parameters(world: int) -> None:
    run_ranks(world, check_all)


def check_all(rank: int) -> None:
    mesh = mesh_of(tp=torch.distributed.get_world_size())
    check_label_and_split(mesh)
    check_local(mesh)
    check_bf16_parts(mesh)
    check_one_use_and_many(mesh)
    check_no_gradient_is_shared(mesh)


def check_label_and_split(mesh) -> None:
    """The split is DTensor's own, so that whatever reads the label (checkpoints, norms) finds the right rows."""
    for shape, dim in (((257, 3), 0), ((5, 3), 0), ((3, 6), 1), ((2, 7), 1), ((9,), 0), ((4, 5), None), ((3,), None)):
        whole = random(*shape, seed=1)
        parameter = labelled_parameter(shape, dim, mesh.tp, torch.device("cpu"))
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


def check_local(mesh) -> None:
    layer = ColumnParallelLinear(3, 8, False, mesh.tp, torch.device("cpu"))
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


def check_bf16_parts(mesh) -> None:
    """Values in bf16, copied once for all micro-batches; gradients in fp32, added in fp32."""
    layer = RowParallelLinear(8, 6, True, mesh.tp, torch.device("cpu"))
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


def check_one_use_and_many(mesh) -> None:
    """Parameters used three times in a graph, in two backward calls, before and after gradients are cleared."""
    tp, cpu, hidden = mesh.tp, torch.device("cpu"), 8
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


def check_no_gradient_is_shared(mesh) -> None:
    """With one token, the gradient of a bias may be the very tensor that flows on: adding to it must not change that one."""
    cases = [(ColumnParallelLinear, 6, 8), (RowParallelLinear, 8, 6)]
    for (layer_type, inputs, outputs), leading in product(cases, [(1, 1), ()]):
        layer = layer_type(inputs, outputs, True, mesh.tp, torch.device("cpu"))
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


def test_counting_sees_dtensor_s_own_collectives() -> None:
    """The counter that other tests trust: a gather that DTensor does by itself is counted."""
    assert run_ranks(2, gather)[0] > 0


def gather(rank: int) -> int:
    mesh = mesh_of(tp=2)
    with collectives() as counted:
        labelled_parameter((4, 2), 0, mesh.tp, torch.device("cpu")).full_tensor()
    return sum(counted.values())
