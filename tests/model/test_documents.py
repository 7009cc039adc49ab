"""Documents kept apart in a row: everything is as if each were alone. The serial twin is run on each document by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.model.plain_gpt import Drop, PlainGPT, copy_weights, our_name, plain_gpt
from tests.model.support import CPU, FAMILIES, gpt2, llama, stage_like, sum_partial_gradients
from tests.ranks import run_ranks
from tests.tensor_parallel.support import mesh_of, part, random, whole_gradient
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model import documents as documents_module
from tptrain.model.documents import RowDocuments, Runs, attend, has_variable_length, runs_of, targets_within, variable_length
from tptrain.model.gpt import Execution, GPTStage
from tptrain.model.rotary import rotation
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX
from tptrain.tensor_parallel.random import Stream, keep_mask

END = 5
LENGTH = 12
ENDS = [[2, 6, 7], [0, 11], [], [4, 12]]
"""Columns of the end id in four rows of 13 tokens: documents of several lengths and of one token, in the middle and at both edges."""
SPANS = [[(0, 3), (3, 7), (7, 8), (8, 12)], [(0, 1), (1, 12)], [(0, 12)], [(0, 5), (5, 12)]]
"""The documents that follow from that, in the 12 columns of the inputs."""
STREAM = Stream(11, 40)
PLAIN = Execution()


def batch(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Inputs and targets [4, 12], as they are read: no target is ignored yet."""
    rows = torch.randint(END + 1, model.vocab_size, (len(ENDS), LENGTH + 1), generator=torch.Generator().manual_seed(1))
    for row, ends in zip(rows, ENDS, strict=True):
        row[ends] = END
    return rows[:, :-1], rows[:, 1:]


def spans() -> Iterator[tuple[int, int, int]]:
    """Row, first and last column (exclusive) of each document."""
    return ((row, first, last) for row, spans in enumerate(SPANS) for first, last in spans)


# ---- which token is of which document ----------------------------------------------------------------------


def test_numbers_and_positions_by_hand() -> None:
    found = RowDocuments.of(batch(gpt2())[0], END)
    for row, documents in enumerate(SPANS):
        for number, (first, last) in enumerate(documents):
            assert found.numbers[row, first:last].tolist() == [number] * (last - first)
            assert found.positions[row, first:last].tolist() == list(range(last - first))
    assert (found.numbers.shape, found.positions.dtype, found.runs) == ((4, 12), torch.int64, None)


def test_targets_stay_within_documents() -> None:
    inputs, targets = batch(gpt2())
    expected = targets.clone()
    for row, ends in enumerate(ENDS):
        for end in ends:
            if end < LENGTH:  # an end id in the last target is predicted as any other token
                expected[row, end] = IGNORE_INDEX
    before = targets.clone()
    assert torch.equal(targets_within(inputs, targets, END), expected)
    assert torch.equal(targets, before)
    assert (expected == IGNORE_INDEX).sum() == 6


def test_a_token_sees_its_own_document_up_to_itself() -> None:
    inputs, _ = batch(gpt2())
    mask = RowDocuments.of(inputs, END).apart(torch.float32, 8)
    assert isinstance(mask, Tensor)
    expected = torch.full((4, 1, LENGTH, LENGTH), -torch.inf)
    for row, first, last in spans():
        for column in range(first, last):
            expected[row, 0, column, first : column + 1] = 0
    assert torch.equal(mask, expected)


def test_runs_are_the_same_documents_end_to_end() -> None:
    inputs, _ = batch(gpt2())
    begins = torch.zeros(4, LENGTH, dtype=torch.bool)
    for row, first, _ in spans():
        begins[row, first] = True
    found = runs_of(begins)
    assert found.starts.dtype == torch.int32
    assert found.starts.tolist() == [row * LENGTH + first for row, first, _ in spans()] + [4 * LENGTH]
    assert found.longest == max(last - first for _, first, last in spans())
    with mock.patch.object(Tensor, "is_cuda", True):
        runs = RowDocuments.of(inputs, END).runs
    assert runs is not None
    assert (runs.starts.tolist(), runs.longest) == (found.starts.tolist(), found.longest)


# ---- the model: as if each document were alone -------------------------------------------------------------


def dropping_in(model: ModelConfig, row: int, first: int, last: int) -> Drop:
    """Dropout for one document: its part of the masks that its row of the micro-batch has."""

    def drop(place: str, x: Tensor) -> Tensor:
        own, square = slice(first, last), "/head " in place
        shape = torch.Size((1, LENGTH, LENGTH) if square else (1, LENGTH, x.shape[-1]))
        mask = keep_mask(Stream(STREAM.seed, STREAM.first_sample + row, f"/{place}"), shape, model.dropout, CPU)
        return x * (mask[:, own, own] if square else mask[:, own])

    return drop


def alone(twin: PlainGPT, model: ModelConfig, drops: bool) -> tuple[Tensor, Tensor]:
    """The twin's logits of each document by itself, put together [4, 12, vocab], and the sum of its losses within documents."""
    inputs, targets = batch(model)
    logits, loss = torch.zeros(*inputs.shape, model.vocab_size), torch.zeros(())
    for row, first, last in spans():
        tokens = inputs[row : row + 1, first:last]
        own = twin(tokens, dropping_in(model, row, first, last)) if drops else twin(tokens)
        logits[row, first:last] = own[0].detach()
        predicted = last - first - int(tokens[0, -1] == END)  # nothing follows the end within the document
        loss = loss + F.cross_entropy(own[0, :predicted], targets[row, first : first + predicted], reduction="sum")
    return logits, loss


def check_alone(mesh: Mesh, model: ModelConfig, execution: Execution = PLAIN, drops: bool = False) -> None:
    """Every logit, the loss and every gradient, of a stage split over mesh.tp and of two in a row."""
    about = f"{model} {execution} tp {mesh.tp_size}"
    inputs, targets = batch(model)
    twin, stream = plain_gpt(model), STREAM if drops else None
    expected_logits, expected = alone(twin, model, drops)
    documents, targets = RowDocuments.of(inputs, END), targets_within(inputs, targets, END)
    stages = [GPTStage(model, first, last, mesh.tp, CPU, execution) for first, last in ((0, 1), (1, model.num_layers))]
    for stage in stages:
        copy_weights(twin, stage)
    whole = stage_like(twin, model, mesh, execution)

    mine = part(expected_logits, -1, mesh.tp_size, mesh.tp_rank)
    handed = stages[0](inputs, None, stream, documents=documents)
    for logits in (whole(inputs, None, stream, documents=documents), stages[1](handed, None, stream, documents=documents)):
        assert (logits - mine).abs().max() <= 1e-5 * expected_logits.abs().max(), about
    loss = whole(inputs, targets, stream, documents=documents)
    assert_close(loss, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{about}: {text}")
    (loss / 40).backward()
    (expected / 40).backward()
    sum_partial_gradients(whole, mesh)
    for name, parameter in twin.named_parameters():
        gradient = whole_gradient(whole.get_parameter(our_name(name)))
        assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{about} {n}: {text}")


MODELS = {
    **{family: make() for family, make in FAMILIES.items()},
    "gpt2 rope": gpt2(position="rope"), "llama learned": llama(position="learned"), "gpt2 gqa": gpt2(num_kv_heads=2, bias=False),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_each_document_as_if_alone(mesh: Mesh, name: str, recompute: str) -> None:
    check_alone(mesh, MODELS[name], Execution(recompute=recompute))
    check_alone(mesh, replace(MODELS[name], dropout=0.3), Execution(recompute=recompute), drops=True)


@pytest.mark.parametrize("world", [2, 4])
def test_each_document_as_if_alone_on_ranks(world: int) -> None:
    run_ranks(world, check_split)


def check_split(rank: int) -> None:
    mesh = mesh_of(tp=torch.distributed.get_world_size())
    for model in MODELS.values():
        for sequence_parallel in (False, True):
            check_alone(mesh, model, Execution(sequence_parallel, "none", 7))
        check_alone(mesh, replace(model, dropout=0.3), Execution(True, "full"), drops=True)
    check_alone(mesh, llama(num_kv_heads=1, dropout=0.3), Execution(True, "selective"), drops=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_stage_itself_says_the_same_of_a_document_alone(mesh: Mesh, name: str) -> None:
    """To 1e-5 of the largest logit, with no other model between; and together documents do sway each other."""
    model = MODELS[name]
    stage = stage_like(plain_gpt(model), model, mesh)
    inputs, _ = batch(model)
    packed = stage(inputs, documents=RowDocuments.of(inputs, END))
    for row, first, last in spans():
        own = stage(inputs[row : row + 1, first:last])
        assert (packed[row, first:last] - own[0]).abs().max() <= 1e-5 * own.abs().max()
    together = stage(inputs)
    assert_close(packed[2], together[2], rtol=1e-5, atol=5e-5)  # the row that is one document
    for row, first, last in spans():
        if first:
            assert not torch.isclose(packed[row, first:last], together[row, first:last], rtol=1e-3).all(), "else there is nothing to show"


def test_rotary_positions_begin_anew(mesh: Mesh) -> None:
    """To the bit: a product depends on the distance alone, so that only rounding would tell."""
    model = llama()
    stage = GPTStage(model, 0, 1, mesh.tp, CPU)
    inputs, _ = batch(model)
    turn = stage.rotation(inputs, RowDocuments.of(inputs, END))
    assert turn is not None
    for row, first, last in spans():
        own = rotation(torch.arange(last - first), model.head_size, model.rope_theta)
        assert all(torch.equal(table[row, 0, first:last], expected) for table, expected in zip(turn, own, strict=True))


# ---- attention by itself -----------------------------------------------------------------------------------

LONG = 1300
"""Several of a kernel's blocks of keys."""


def long_documents() -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Ids [2, 1300] whose documents begin and end within and across the kernel's blocks, and where they lie."""
    ids = torch.ones(2, LONG, dtype=torch.int64)
    ids[0, [99, 513, 514, 1151]] = 0
    ids[1, [1, 767, 1023]] = 0
    edges = [[0, 100, 514, 515, 1152, LONG], [0, 2, 768, 1024, LONG]]
    return ids, [(row, first, last) for row, cuts in enumerate(edges) for first, last in itertools.pairwise(cuts)]


def check_attention(device: torch.device, dtype: torch.dtype, tolerance: float, head_size: int = 16) -> None:
    """Values and gradients of attention over long rows against each document's own causal softmax in fp64."""
    ids, documents = long_documents()
    for kv_heads in (4, 2):
        shapes = ((2, 4, LONG, head_size), (2, kv_heads, LONG, head_size), (2, kv_heads, LONG, head_size))
        given = [random(*shape, seed=seed).to(device, dtype).requires_grad_() for seed, shape in enumerate(shapes)]
        exact = [x.detach().double().requires_grad_() for x in given]
        grad = random(*shapes[0], seed=9).to(device, dtype)
        y = attend(*given, RowDocuments.of(ids.to(device), 0).apart(dtype, head_size))
        y.backward(grad)
        expected = torch.zeros_like(y, dtype=torch.float64)
        for row, first, last in documents:
            q, k, v = (x[row, :, first:last] for x in exact)
            k, v = (x.repeat_interleave(4 // kv_heads, dim=0) for x in (k, v))
            future = torch.ones(last - first, last - first, dtype=torch.bool, device=device).triu(1)
            scores = (q @ k.transpose(-1, -2) / head_size**0.5).masked_fill(future, -torch.inf)
            expected[row, :, first:last] = scores.softmax(-1) @ v
        expected.backward(grad.double())
        assert y.dtype == dtype
        assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        for found, wanted in zip(given, exact, strict=True):
            assert found.grad is not None
            assert_close(found.grad.double(), wanted.grad, rtol=10 * tolerance, atol=10 * tolerance)


def test_long_documents_on_cpu() -> None:
    check_attention(CPU, torch.float32, 2e-6)
    check_attention(CPU, torch.bfloat16, 1e-2)


def varlen_by_its_documentation(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch says of `varlen_attn`, one sequence after the other; q [T, heads, d], k and v [T, kv heads, d]."""
    assert query.dim() == key.dim() == value.dim() == 3
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    edges, lengths = cu_seq_q.tolist(), cu_seq_q.diff().tolist()
    assert (edges, edges[0], edges[-1], max_q, max_k) == (cu_seq_k.tolist(), 0, len(query), max(lengths), max(lengths))
    assert window_size == (-1, 0), "(-1, 0) for causal attention"
    outputs = []
    for first, last in itertools.pairwise(edges):
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outputs)


def test_what_variable_length_attention_is_asked_for() -> None:
    """With a kernel that does what torch's documentation says: the right values and gradients."""
    with (
        mock.patch.object(Tensor, "is_cuda", True),
        mock.patch.object(documents_module, "has_variable_length", return_value=True),
        mock.patch.object(documents_module, "variable_length", return_value=varlen_by_its_documentation),
    ):
        assert isinstance(RowDocuments.of(torch.zeros(1, 4, dtype=torch.int64), 0).apart(torch.float32, 8), Runs)
        check_attention(CPU, torch.float32, 2e-6)
        documents = RowDocuments.of(torch.zeros(1, 4, dtype=torch.int64), 0)
        assert isinstance(documents.apart(torch.float32, 8, as_mask=True), Tensor), "dropout has the weights as a matrix"


def test_where_variable_length_attention_is_used() -> None:
    gpu = torch.device("cuda", 0)
    assert variable_length() is not None, "this torch has it, with a window and grouped heads"
    assert not has_variable_length(CPU, torch.bfloat16, 64)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
        assert has_variable_length(gpu, torch.bfloat16, 64)
        assert has_variable_length(gpu, torch.float16, 256)
        assert not has_variable_length(gpu, torch.float32, 64)
        assert not has_variable_length(gpu, torch.bfloat16, 20)
        assert not has_variable_length(gpu, torch.bfloat16, 264)
        with mock.patch.object(documents_module, "variable_length", return_value=None):
            assert not has_variable_length(gpu, torch.bfloat16, 64)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(7, 5)):
        assert not has_variable_length(gpu, torch.bfloat16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_long_documents_on_a_gpu() -> None:
    gpu = torch.device("cuda", 0)
    check_attention(gpu, torch.float32, 1e-4, 64)
    check_attention(gpu, torch.bfloat16, 2e-2, 64)
    check_attention(gpu, torch.bfloat16, 2e-2, 20)  # no kernel for such heads: the mask
    if has_variable_length(gpu, torch.bfloat16, 64):
        ids = long_documents()[0].to(gpu)
        assert isinstance(RowDocuments.of(ids, 0).apart(torch.bfloat16, 64), Runs)
