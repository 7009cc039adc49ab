"""The model against a GPT of plain torch.nn: logits, loss, every gradient; whole, split over tp, and cut into stages."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.model.plain_gpt import copy_weights, our_name, plain_gpt
from tests.ranks import run_ranks
from tests.support import small_config
from tests.tensor_parallel.support import collectives, mesh_of, part, whole_gradient
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.gpt import GPTStage

CPU = torch.device("cpu")


def small_model(tied: bool, bias: bool, layers: int = 2) -> ModelConfig:
    return small_config(model__tie_embeddings=tied, model__bias=bias, model__num_layers=layers).model


def batch(model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [3, 10]; some targets are to be ignored. Shorter than max_seq_len, a batch that is not square."""
    rows = torch.randint(model.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))
    inputs, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[0, 3] = targets[2, 9] = -100
    return inputs, targets


@pytest.mark.parametrize(("tied", "bias"), list(itertools.product((True, False), repeat=2)))
def test_one_process(mesh: Mesh, tied: bool, bias: bool) -> None:
    check_against_plain_gpt(mesh, tied, bias)


@pytest.mark.parametrize("world", [2, 4])
def test_split_over_ranks(world: int) -> None:
    run_ranks(world, check_split)


def check_split(rank: int) -> None:
    mesh = mesh_of(tp=torch.distributed.get_world_size())
    check_against_plain_gpt(mesh, tied=True, bias=True)
    check_against_plain_gpt(mesh, tied=False, bias=False)


def check_against_plain_gpt(mesh: Mesh, tied: bool, bias: bool) -> None:
    model = small_model(tied, bias)
    twin = plain_gpt(model)
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, CPU)
    copy_weights(twin, stage)
    inputs, targets = batch(model)

    expected_logits = twin(inputs)
    assert_close(stage(inputs), part(expected_logits, -1, mesh.tp_size, mesh.tp_rank), rtol=1e-5, atol=1e-5)

    expected = F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    with collectives() as forward:
        loss = stage(inputs, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    with collectives() as backward:
        (loss / 28).backward()
    (expected / 28).backward()  # of 3 x 10 tokens, 2 don't count
    for name, parameter in twin.named_parameters():
        gradient = whole_gradient(stage.get_parameter(our_name(name)))
        assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert {our_name(name) for name, _ in twin.named_parameters()} == {name for name, _ in stage.named_parameters()}

    if mesh.tp_size > 1:  # a block: one for attention and one for the MLP in each direction; embedding, loss (two); head
        assert forward == {"allreduce": 2 * model.num_layers + 3}
        assert backward == {"allreduce": 2 * model.num_layers + 1}


@pytest.mark.parametrize("tied", [True, False])
def test_stages_in_a_row_are_the_whole(mesh: Mesh, tied: bool) -> None:
    model = small_model(tied, bias=True, layers=5)
    twin = plain_gpt(model)
    inputs, targets = batch(model)
    cuts = [(0, 2), (2, 3), (3, 5)]
    stages = [GPTStage(model, first, last, mesh.tp, CPU) for first, last in cuts]
    for stage in stages:
        copy_weights(twin, stage)

    x = stages[0](inputs)
    assert x.shape == (3, 10, model.hidden_size)
    loss = stages[2](stages[1](x), targets)
    expected = F.cross_entropy(twin(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()

    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            gradients[name] = gradients.get(name, 0) + whole_gradient(parameter)  # a tied embedding has two copies
    assert gradients.keys() == {our_name(name) for name, _ in twin.named_parameters()}
    for name, parameter in twin.named_parameters():
        assert_close(gradients[our_name(name)], parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")

    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, False), (False, True)]
    names = [{name.split(".layers")[0].split(".")[0] for name, _ in stage.named_parameters()} for stage in stages]
    assert names == [{"embedding", "positions", "layers"}, {"layers"}, {"layers", "final_norm", "embedding" if tied else "head"}]
    assert [list(stage.layers) for stage in stages] == [["0", "1"], ["2"], ["3", "4"]], "layers keep the numbers of the whole model"


def test_a_token_sees_nothing_that_comes_after_it(mesh: Mesh) -> None:
    model = small_model(tied=True, bias=True)
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, CPU)
    copy_weights(plain_gpt(model), stage)
    inputs, _ = batch(model)
    changed = inputs.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % model.vocab_size
    before, after = stage(inputs), stage(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(dim=-1).any()
