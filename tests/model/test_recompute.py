"""Recomputation: the same bits, fewer bytes kept between forward and backward, and nothing repeated that is dear."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model.plain_gpt import copy_weights, plain_gpt
from tests.model.support import CPU, FAMILIES, batch, communications, stage_like, sum_partial_gradients
from tests.ranks import run_ranks
from tests.tensor_parallel.support import mesh_of, operations, random
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.gpt import Execution, GPTStage
from tptrain.tensor_parallel.parameter import compute_in
from tptrain.tensor_parallel.random import Stream

KINDS = ("none", "selective", "full")
SAMPLES, LENGTH, LAYERS = 3, 12, 2
FP32 = 4


def results(mesh: Mesh, model: ModelConfig, execution: Execution, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """This rank's loss and gradients of two micro-batches, whose samples are numbers 5 to 7 and 8 to 10."""
    stage = stage_like(plain_gpt(model), model, mesh, execution)
    compute_in(stage, dtype)
    inputs, targets = batch(model)
    losses: list[Tensor] = []
    for first, rows in ((5, inputs), (8, inputs.flip(0))):
        loss = stage(rows, targets, Stream(3, first) if model.dropout else None)
        loss.backward()
        losses.append(loss.detach())
    sum_partial_gradients(stage, mesh)
    return {"loss": torch.stack(losses)} | {name: p.grad.to_local() for name, p in stage.named_parameters()}


def check_bits(mesh: Mesh, sequence_parallel: bool, dtype: torch.dtype = torch.float32) -> None:
    for family in FAMILIES:
        for probability in (0.0, 0.1):
            model = FAMILIES[family](dropout=probability)
            none, selective, full = (results(mesh, model, Execution(sequence_parallel, kind), dtype) for kind in KINDS)
            for name, expected in none.items():
                about = (family, probability, sequence_parallel, name)
                assert torch.equal(selective[name], expected), about
                assert torch.equal(full[name], expected), about


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_on_one_process(mesh: Mesh, dtype: torch.dtype) -> None:
    check_bits(mesh, False, dtype)


def test_the_same_bits_and_no_dear_repetition_on_two_ranks() -> None:
    run_ranks(2, check_two_ranks)


def check_two_ranks(rank: int) -> None:
    mesh = mesh_of(tp=dist.get_world_size())
    for sequence_parallel in (True, False):
        check_bits(mesh, sequence_parallel)
        check_kept_bytes(mesh, sequence_parallel)
        check_repetitions(mesh, sequence_parallel)


class kept_storages(TorchDispatchMode):
    """What operations make while it is entered; `bytes()` counts what of that still lives, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self, not_counted: list[Tensor]) -> int:
        """not_counted: what was there before, of which operations made other views."""
        gc.collect()
        before = {tensor.untyped_storage()._cdata for tensor in not_counted}
        return sum(size for key, (storage, size) in self.made.items() if key not in before and not storage.expired())


def middle_stage(mesh: Mesh, model: ModelConfig, execution: Execution, length: int = LENGTH) -> tuple[GPTStage, Tensor]:
    """Two blocks without embedding and head, and activations to go in."""
    model = replace(model, num_layers=LAYERS + 2)
    stage = GPTStage(model, 1, 1 + LAYERS, mesh.tp, CPU, execution)
    copy_weights(plain_gpt(model), stage)
    split = mesh.tp_size if execution.sequence_parallel else 1
    return stage, random(SAMPLES, length // split, model.hidden_size, seed=mesh.tp_rank if split > 1 else 0).requires_grad_()


def kept_bytes(mesh: Mesh, model: ModelConfig, execution: Execution, length: int = LENGTH) -> int:
    """Bytes that the blocks keep for backward: all that lives after forward but the result."""
    stage, x = middle_stage(mesh, model, execution, length)
    stream = Stream(3, 5) if model.dropout else None
    with kept_storages() as kept:
        y = stage(x, stream=stream)
    return kept.bytes([x, y, *(parameter.to_local() for parameter in stage.parameters())])


def check_kept_bytes(mesh: Mesh, sequence_parallel: bool) -> None:
    tp, tokens = mesh.tp_size, SAMPLES * LENGTH
    split = tp if sequence_parallel else 1
    for family, make in FAMILIES.items():
        model = make()
        h, f, heads = model.hidden_size, model.ffn_hidden_size, model.num_heads
        none, selective, full = (kept_bytes(mesh, model, Execution(sequence_parallel, kind)) for kind in KINDS)
        # Of each block: the outputs of two norms, and the activation's.
        assert none - selective == LAYERS * tokens * FP32 * (2 * h // split + f // tp), (family, sequence_parallel)
        # Of each block but the first its input, which `kept_bytes` does not count there; a cosine and a sine for a position and pair.
        angles = LENGTH * model.head_size * FP32 if family == "llama" else 0
        assert full == (LAYERS - 1) * tokens * FP32 * h // split + angles, (family, sequence_parallel)
        if family == "gpt2":
            # norms: output, mean and 1/deviation; the sum after attention; q, k, v, attention's output with a number a head;
            # what goes into the activation and comes out of it
            block = (2 * (h + 2) + h) // split + (4 * h + heads + 2 * f) // tp
            assert none == LAYERS * tokens * FP32 * block + (LAYERS - 1) * tokens * FP32 * h // split
        with_dropout = replace(model, dropout=0.1)
        assert kept_bytes(mesh, with_dropout, Execution(sequence_parallel, "full")) == full


def test_bytes_kept_for_backward(mesh: Mesh) -> None:
    check_kept_bytes(mesh, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_keeps_nothing_that_grows_with_the_square_of_the_sequence(mesh: Mesh, family: str) -> None:
    """With dropout attention's weights are matrices [s, s]."""
    model = FAMILIES[family](dropout=0.1)
    short, long = (kept_bytes(mesh, model, Execution(recompute="selective"), length) for length in (8, 16))
    assert long == 2 * short
    short, long = (kept_bytes(mesh, model, Execution(recompute="none"), length) for length in (8, 16))
    squares = SAMPLES * model.num_heads * FP32 * LAYERS  # weights, mask, what is left of the weights
    assert long - 2 * short >= 3 * squares * (16**2 - 2 * 8**2)


PRODUCTS = ("mm", "addmm", "addmm_", "_scaled_dot_product_flash_attention_for_cpu")


def backward_counts(mesh: Mesh, model: ModelConfig, execution: Execution) -> tuple[dict[str, int], dict[str, int], int]:
    """Backward's collectives and matrix products by name, and how many products of batches, which are attention's with dropout."""
    stage, x = middle_stage(mesh, model, execution)
    y = stage(x, stream=Stream(3, 5) if model.dropout else None)
    with communications() as collectives, operations() as counts:
        y.backward(torch.ones_like(y))
    products = {name: counts[name] for name in PRODUCTS if name in counts}
    return collectives, products, counts.get("bmm", 0)


def check_repetitions(mesh: Mesh, sequence_parallel: bool) -> None:
    for make in FAMILIES.values():
        for probability in (0.0, 0.1):
            model = make(dropout=probability)
            none, selective, full = (backward_counts(mesh, model, Execution(sequence_parallel, kind)) for kind in KINDS)
            assert none[1]["mm"] > 0, "it does count"
            assert selective[:2] == none[:2]
            assert selective[2] - none[2] == (LAYERS if probability else 0), "of each layer q k^T, for the weights"
            layers = 1 + len([name for name in ("q", "k", "v", "out", "gate", "up") if model.activation == "swiglu" or name != "gate"])
            forward = LAYERS * layers
            assert sum(full[1].values()) - sum(none[1].values()) == forward + (0 if probability else LAYERS), "full makes them all again"
            if mesh.tp_size > 1:
                forward = (4 if sequence_parallel else 2) - (0 if probability else 1)  # the last sum only for a mask that follows it
                assert sum(full[0].values()) - sum(none[0].values()) == LAYERS * forward


def test_nothing_dear_is_repeated(mesh: Mesh) -> None:
    check_repetitions(mesh, False)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_nothing_is_kept(mesh: Mesh, kind: str) -> None:
    stage, x = middle_stage(mesh, FAMILIES["llama"](), Execution(recompute=kind))
    with torch.no_grad(), kept_storages() as kept:
        y = stage(x)
    assert kept.bytes([x, y, *(parameter.to_local() for parameter in stage.parameters())]) == 0
    assert torch.equal(y, stage(x))
