"""The small parts by their formulas: rotary positions as complex numbers, RMSNorm in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tests.model.plain_gpt import turn
from tests.model.support import CPU, gpt2, llama
from tests.tensor_parallel.support import fill, random, whole_gradient
from tptrain.mesh import Mesh
from tptrain.model.norm import NORMS
from tptrain.model.rotary import rotate, rotation


@pytest.mark.parametrize(("head_size", "theta"), [(2, 10.0), (6, 100.0), (64, 500000.0)])
def test_rotation_is_multiplication_by_complex_numbers(head_size: int, theta: float) -> None:
    x = random(2, 3, 11, head_size, seed=1)
    assert_close(rotate(x, rotation(torch.arange(11), head_size, theta)), turn(x, theta), rtol=1e-5, atol=1e-5)


def test_angles_by_hand() -> None:
    """Of (1, 0) at position 3: (cos, sin) of 3 for the first pair and of 3/theta^(1/2) for the second; element i's partner is i + 2."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 4, 4)
    expected = torch.tensor([math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)])
    assert_close(rotate(x, rotation(torch.arange(4), 4, 100.0))[0, 0, 3], expected, rtol=1e-6, atol=1e-6)


def test_a_product_depends_on_the_distance_alone() -> None:
    q, k = random(1, 1, 1, 16, seed=1), random(1, 1, 1, 16, seed=2)

    def product(at_q: int, at_k: int) -> torch.Tensor:
        turned = [rotate(x, rotation(torch.tensor([p]), 16, 100.0)) for x, p in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    for distance in (-3, 0, 1, 5):
        assert_close(product(20 + distance, 20), product(7 + distance, 7), rtol=1e-5, atol=1e-5)
    values = [float(product(20 + distance, 20)) for distance in range(6)]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3, "and on it it does depend, in sign too"
    assert abs(float(product(20, 23)) - float(product(23, 20))) > 1e-3


def test_norms_stay_and_position_zero_turns_nothing() -> None:
    x = random(2, 3, 9, 8, seed=3)
    y = rotate(x, rotation(torch.arange(9), 8, 10000.0))
    assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    assert not torch.isclose(y[:, :, 1:], x[:, :, 1:]).all()


def test_rows_with_positions_of_their_own() -> None:
    """[b, 1, s] positions: what stands at position p is turned as in a row that counts from 0."""
    x = random(2, 3, 4, 8, seed=4)
    positions = torch.tensor([[5, 6, 7, 8], [0, 3, 3, 11]])
    turned = rotate(x, rotation(positions.unsqueeze(1), 8, 100.0))
    for row in range(2):
        for place, position in enumerate(positions[row]):
            whole = torch.zeros(1, 3, 12, 8)
            whole[0, :, position] = x[row, :, place]
            assert_close(turned[row, :, place], turn(whole, 100.0)[0, :, position], rtol=1e-5, atol=1e-5)


def test_bf16_is_rounded_once_and_angles_stay_exact() -> None:
    """At position 4001 an angle in bf16 would be off by up to 16."""
    x = random(1, 1, 1, 8, seed=5).bfloat16()
    turn_far = rotation(torch.tensor([4001]), 8, 10000.0)
    assert turn_far.cos.dtype == torch.float32
    y = rotate(x, turn_far)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), turn_far).bfloat16())
    assert_close(turn_far.cos[0, 0].double(), torch.tensor(4001.0).double().cos(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_norms_by_formula(mesh: Mesh, name: str) -> None:
    """Values and all gradients in double precision; eps is of the size of the mean square."""
    model = (llama if name == "rmsnorm" else gpt2)(norm_eps=0.3)
    h = model.hidden_size
    norm = NORMS[name](model, mesh.tp, CPU, False)
    values = {key: random(h, seed=i) + 1 for i, key in enumerate(dict(norm.named_parameters()))}
    for key, parameter in norm.named_parameters():
        fill(parameter, values[key])
    x, grad = random(3, 5, h, seed=9) * 0.5 + 0.2, random(3, 5, h, seed=8)
    exact = {key: value.double().requires_grad_() for key, value in values.items()} | {"x": x.double().requires_grad_()}
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)

    z = exact["x"] if name == "rmsnorm" else exact["x"] - exact["x"].mean(-1, keepdim=True)
    expected = z * (z.pow(2).sum(-1, keepdim=True) / h + 0.3).pow(-0.5) * exact["weight"] + exact.get("bias", 0)
    expected.backward(grad.double())
    assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(x.grad.double(), exact["x"].grad, rtol=1e-5, atol=1e-5)
    assert set(values) == ({"weight"} if name == "rmsnorm" else {"weight", "bias"})
    for key, parameter in norm.named_parameters():
        assert_close(whole_gradient(parameter).double(), exact[key].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "bias"), [("layernorm", True), ("layernorm", False), ("rmsnorm", True), ("rmsnorm", False)])
def test_partial_gradients_of_norms(mesh: Mesh, name: str, bias: bool) -> None:
    """Under sequence parallelism all a norm has is a part; else nothing is."""
    for sequence in (True, False):
        norm = NORMS[name](gpt2(bias=bias), mesh.tp, CPU, sequence)
        assert set(norm.partial_gradients) == ({key for key, _ in norm.named_parameters()} if sequence else set())
