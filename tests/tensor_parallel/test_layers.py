"""Each split layer against its serial twin from torch.nn: output, input gradient, every parameter's gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, fill, mesh_of, part, random, whole_gradient
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

CPU = torch.device("cpu")
LAYOUTS = [(1, {"tp": 1}), (2, {"tp": 2}), (4, {"tp": 4}), (4, {"tp": 2, "dp": 2})]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_layers_equal_their_serial_twins(world: int) -> None:
    run_ranks(world, check_all, [layout for size, layout in LAYOUTS if size == world])


def check_all(rank: int, layouts: list[dict[str, int]]) -> None:
    for layout in layouts:
        mesh = mesh_of(**layout)
        for bias in (True, False):
            for outputs in (8, 5):  # 5 rows: 3 + 2, or 2 + 2 + 1 and none
                check_column(mesh, outputs, bias)
            check_row(mesh, bias)
        check_bias_counts_once(mesh)
        for vocabulary in (257, 5):
            check_embedding(mesh, vocabulary)
        check_column_then_row(mesh)


def serial_linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    twin = nn.Linear(inputs, outputs, bias=bias)
    twin.weight.data = random(outputs, inputs, seed=1)
    if bias:
        twin.bias.data = random(outputs, seed=2)
    return twin


def check_gradients(layer: nn.Module, twin: nn.Module) -> None:
    ours, theirs = dict(layer.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert_close(whole_gradient(parameter), theirs[name].grad, msg=lambda text, n=name: f"{type(layer).__name__}.{n}: {text}")


def load(layer: nn.Module, twin: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        fill(parameter, twin.get_parameter(name).data)


def check_column(mesh, outputs: int, bias: bool) -> None:
    twin = serial_linear(6, outputs, bias)
    layer = ColumnParallelLinear(6, outputs, bias, mesh.tp, CPU)
    load(layer, twin)
    x, twin_x = (random(2, 3, 6, seed=3).requires_grad_() for _ in range(2))
    gradient = random(2, 3, outputs, seed=4)
    mine = (-1, mesh.tp_size, mesh.tp_rank)

    y, expected = layer(x), twin(twin_x)
    assert_close(y, part(expected, *mine))
    y.backward(part(gradient, *mine))
    expected.backward(gradient)
    assert_close(x.grad, twin_x.grad)
    check_gradients(layer, twin)
    assert layer.row_start == sum(part(torch.arange(outputs), 0, mesh.tp_size, i).numel() for i in range(mesh.tp_rank))


def check_row(mesh, bias: bool) -> None:
    twin = serial_linear(8, 6, bias)
    layer = RowParallelLinear(8, 6, bias, mesh.tp, CPU)
    load(layer, twin)
    whole, gradient = random(2, 3, 8, seed=3), random(2, 3, 6, seed=4)
    mine = (-1, mesh.tp_size, mesh.tp_rank)
    x, twin_x = part(whole, *mine).clone().requires_grad_(), whole.clone().requires_grad_()

    y, expected = layer(x), twin(twin_x)
    assert_close(y, expected)
    y.backward(gradient)
    expected.backward(gradient)
    assert_close(x.grad, part(twin_x.grad, *mine))
    check_gradients(layer, twin)


def check_bias_counts_once(mesh) -> None:
    """With nothing but a bias, the row layer's output is that bias on every rank, and its gradient the incoming one's sum."""
    layer = RowParallelLinear(8, 6, True, mesh.tp, CPU)
    fill(layer.weight, torch.zeros(6, 8))
    fill(layer.bias, random(6, seed=1))
    y = layer(part(random(4, 8, seed=2), -1, mesh.tp_size, mesh.tp_rank))
    assert_close(y, random(6, seed=1).expand(4, 6))
    y.backward(random(4, 6, seed=3))
    assert_close(layer.bias.grad.to_local(), random(4, 6, seed=3).sum(0))


def check_embedding(mesh, vocabulary: int) -> None:
    twin = nn.Embedding(vocabulary, 6)
    twin.weight.data = random(vocabulary, 6, seed=1)
    layer = VocabParallelEmbedding(vocabulary, 6, mesh.tp, CPU)
    load(layer, twin)
    drawn = torch.randint(vocabulary, (40,), generator=torch.Generator().manual_seed(2))
    tokens = torch.cat((torch.arange(vocabulary), drawn)).view(-1, 1)  # every id, some of them again
    if mesh.tp_size == 4 and vocabulary == 5:
        assert (layer.start == layer.stop) == (mesh.tp_rank == 3), "the last of four ranks owns nothing of 5 rows"

    y, expected = layer(tokens), twin(tokens)
    assert_close(y, expected)
    gradient = random(*y.shape, seed=3)
    y.backward(gradient)
    expected.backward(gradient)
    check_gradients(layer, twin)


def check_column_then_row(mesh) -> None:
    """A split MLP: nothing is communicated between the two layers, one all-reduce forward and one backward."""
    twins = serial_linear(6, 8, True), serial_linear(8, 6, True)
    layers = ColumnParallelLinear(6, 8, True, mesh.tp, CPU), RowParallelLinear(8, 6, True, mesh.tp, CPU)
    for layer, twin in zip(layers, twins, strict=True):
        load(layer, twin)

    def run(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
        return down(F.gelu(up(x)))

    x, twin_x = (random(2, 3, 6, seed=3).requires_grad_() for _ in range(2))
    with collectives() as forward:
        y = run(*layers, x)
    expected = run(*twins, twin_x)
    assert_close(y, expected)
    with collectives() as backward:
        y.backward(random(2, 3, 6, seed=4))
    expected.backward(random(2, 3, 6, seed=4))
    assert_close(x.grad, twin_x.grad, rtol=1e-5, atol=1e-5)
    for layer, twin in zip(layers, twins, strict=True):
        check_gradients(layer, twin)
    assert forward == backward == ({} if mesh.tp_size == 1 else {"allreduce": 1})
