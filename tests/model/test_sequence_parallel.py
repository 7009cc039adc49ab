"""Sequence parallelism in the whole stage: the serial twin's values and gradients, split activations between the blocks, and the
collectives of a block by number."""

from __future__ import annotations

import pytest
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from tests.model.plain_gpt import copy_weights, our_name, plain_gpt
from tests.model.support import (
    CPU,
    FAMILIES,
    LENGTH,
    SAMPLES,
    batch,
    check_against_twin,
    communications,
    gpt2,
    llama,
    sum_partial_gradients,
)
from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, mesh_of, part, random, whole_gradient
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.gpt import Execution, GPTStage

SPLIT = Execution(sequence_parallel=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_has_nothing_to_split(mesh: Mesh, family: str) -> None:
    check_against_twin(mesh, FAMILIES[family](), SPLIT)


@pytest.mark.parametrize("world", [2, 4])
def test_the_stage_equals_the_serial_twin(world: int) -> None:
    run_ranks(world, check_stage)


def check_stage(rank: int) -> None:
    mesh = mesh_of(tp=dist.get_world_size())
    for tied, bias in ((True, True), (False, False)):
        check_against_twin(mesh, gpt2(tie_embeddings=tied, bias=bias), SPLIT)
    for tied, bias, kv_heads in ((True, True, 1), (False, False, 2), (False, True, 8), (True, False, 4)):
        check_against_twin(mesh, llama(tie_embeddings=tied, bias=bias, num_kv_heads=kv_heads), SPLIT)
    for model in (gpt2(), llama(num_kv_heads=2)):
        check_against_twin(mesh, model, Execution(sequence_parallel=True, recompute="selective", loss_chunk_tokens=5))
        check_against_twin(mesh, model, Execution(sequence_parallel=True, recompute="full", loss_chunk_tokens=36))
        check_cut_in_the_middle(mesh, model)


def check_cut_in_the_middle(mesh: Mesh, model: ModelConfig) -> None:
    """Stages hand over [b, s/tp, h], which is also what lies between their blocks."""
    twin = plain_gpt(model)
    inputs, targets = batch(model)
    stages = [GPTStage(model, first, first + 1, mesh.tp, CPU, SPLIT) for first in (0, 1)]
    shapes: list[tuple[int, ...]] = []
    for stage in stages:
        copy_weights(twin, stage)
        for name, module in stage.named_modules():
            if name.endswith(("norm", "attention", "mlp", "0", "1")):
                module.register_forward_hook(lambda _, arguments, y: shapes.extend((tuple(arguments[0].shape), tuple(y.shape))))
    handed = stages[0](inputs)
    loss = stages[1](handed, targets)
    # two blocks with two norms, attention and an MLP each, and the final norm; in and out
    assert shapes == [(SAMPLES, LENGTH // mesh.tp_size, model.hidden_size)] * 2 * (2 * 5 + 1)
    assert handed.shape == (SAMPLES, LENGTH // mesh.tp_size, model.hidden_size)

    expected = F.cross_entropy(twin(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (loss / 34).backward()
    (expected / 34).backward()
    for stage in stages:
        sum_partial_gradients(stage, mesh)
    for name, parameter in twin.named_parameters():
        copies = [dict(stage.named_parameters()).get(our_name(name)) for stage in stages]
        gradient = sum(whole_gradient(copy) for copy in copies if copy is not None)
        assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_of_a_block(world: int) -> None:
    run_ranks(world, check_collectives)


def check_collectives(rank: int) -> None:
    mesh = mesh_of(tp=dist.get_world_size())
    for model in (gpt2(num_layers=4), llama(num_layers=4, num_kv_heads=2)):
        x, grad = (random(SAMPLES, LENGTH, model.hidden_size, seed=seed) for seed in (1, 2))
        for sequence in (True, False):
            stage = GPTStage(model, 1, 3, mesh.tp, CPU, Execution(sequence_parallel=sequence))  # no embedding, no head
            copy_weights(plain_gpt(model), stage)
            mine = part(x, 1, mesh.tp_size, mesh.tp_rank).clone() if sequence else x.clone()
            with communications() as forward, collectives() as sent_forward:
                y = stage(mine.requires_grad_())
            with communications() as backward, collectives() as sent_backward:
                y.backward(part(grad, 1, mesh.tp_size, mesh.tp_rank).contiguous() if sequence else grad)
            check_counts(len(stage.layers), mesh.tp_size, sequence, (forward, sent_forward), (backward, sent_backward))


def check_counts(
    layers: int, tp: int, sequence: bool, forward: tuple[dict[str, int], ...], backward: tuple[dict[str, int], ...]
) -> None:  # fmt: skip
    """What was asked for, and what gloo was given to do for it: a message to and from each other rank."""
    if not sequence:
        assert forward == ({"all_reduce": 2 * layers}, {"allreduce": 2 * layers})
        assert backward == ({"all_reduce": 2 * layers}, {"allreduce": 2 * layers})
        return
    assert forward[0] == {"all_gather": 2 * layers, "reduce_scatter": 2 * layers}
    # backward gathers the row layers' gradient, and x again for the column layers' weights
    assert backward[0] == {"all_gather": 4 * layers, "reduce_scatter": 2 * layers}
    assert forward[1] == {"send": 4 * layers * (tp - 1), "recv": 4 * layers * (tp - 1)}
    assert backward[1] == {"send": 6 * layers * (tp - 1), "recv": 6 * layers * (tp - 1)}
