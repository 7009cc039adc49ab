"""The model against a GPT of plain torch.nn: logits, loss, every gradient; whole, split over tp, and cut into stages."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.model.plain_gpt import copy_weights, our_name, plain_gpt
from tests.model.support import CPU, FAMILIES, LENGTH, SAMPLES, batch, check_against_twin, gpt2, llama, stage_like
from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, mesh_of, whole_gradient
from tptrain.mesh import Mesh
from tptrain.model.gpt import Execution, GPTStage

TIED_BIAS = list(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tied", "bias"), TIED_BIAS)
def test_one_process(mesh: Mesh, family: str, tied: bool, bias: bool) -> None:
    check_against_twin(mesh, FAMILIES[family](tie_embeddings=tied, bias=bias))


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_key_value_heads_on_one_process(mesh: Mesh, kv_heads: int) -> None:
    check_against_twin(mesh, llama(num_kv_heads=kv_heads))


@pytest.mark.parametrize("changes", [{"norm": "rmsnorm"}, {"position": "rope"}, {"activation": "swiglu"}, {"num_kv_heads": 2}], ids=str)
def test_each_choice_of_the_second_family_alone(mesh: Mesh, changes: dict[str, object]) -> None:
    check_against_twin(mesh, gpt2(**changes))


@pytest.mark.parametrize("world", [2, 4])
def test_split_over_ranks(world: int) -> None:
    run_ranks(world, check_split)


def check_split(rank: int) -> None:
    mesh = mesh_of(tp=torch.distributed.get_world_size())
    check_against_twin(mesh, gpt2(tie_embeddings=True, bias=True))
    check_against_twin(mesh, gpt2(tie_embeddings=False, bias=False), Execution(loss_chunk_tokens=5))
    for tied, bias in TIED_BIAS:
        for kv_heads in (1, 2, 8):
            check_against_twin(mesh, llama(tie_embeddings=tied, bias=bias, num_kv_heads=kv_heads))
    check_against_twin(mesh, llama(num_kv_heads=4), Execution(loss_chunk_tokens=7))
    for model in (gpt2(), llama(num_kv_heads=1)):
        twin = plain_gpt(model)
        stage = stage_like(twin, model, mesh)
        with collectives() as forward:
            loss = stage(*batch(model))
        with collectives() as backward:
            loss.backward()
        # A block: one for attention and one for the MLP in each direction; embedding, loss (two); head.
        assert forward == {"allreduce": 2 * model.num_layers + 3}
        assert backward == {"allreduce": 2 * model.num_layers + 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_stages_in_a_row_are_the_whole(mesh: Mesh, family: str, tied: bool) -> None:
    model = FAMILIES[family](tie_embeddings=tied, num_layers=5)
    twin = plain_gpt(model)
    inputs, targets = batch(model)
    cuts = [(0, 2), (2, 3), (3, 5)]
    stages = [GPTStage(model, first, last, mesh.tp, CPU) for first, last in cuts]
    for stage in stages:
        copy_weights(twin, stage)

    x = stages[0](inputs)
    assert x.shape == (SAMPLES, LENGTH, model.hidden_size)
    loss = stages[2](stages[1](x), targets)
    expected = F.cross_entropy(twin(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (loss / 34).backward()
    (expected / 34).backward()

    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            gradients[name] = gradients.get(name, 0) + whole_gradient(parameter)  # a tied embedding has two copies
    assert gradients.keys() == {our_name(name) for name, _ in twin.named_parameters()}
    for name, parameter in twin.named_parameters():
        assert_close(gradients[our_name(name)], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")

    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, False), (False, True)]
    names = [{name.split(".layers")[0].split(".")[0] for name, _ in stage.named_parameters()} for stage in stages]
    first = {"embedding", "positions", "layers"} if family == "gpt2" else {"embedding", "layers"}
    assert names == [first, {"layers"}, {"layers", "final_norm", "embedding" if tied else "head"}]
    assert [list(stage.layers) for stage in stages] == [["0", "1"], ["2"], ["3", "4"]], "layers keep the numbers of the whole model"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_sees_nothing_that_comes_after_it(mesh: Mesh, family: str) -> None:
    model = FAMILIES[family]()
    stage = stage_like(plain_gpt(model), model, mesh)
    inputs, _ = batch(model)
    changed = inputs.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % model.vocab_size
    before, after = stage(inputs), stage(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(dim=-1).any()
