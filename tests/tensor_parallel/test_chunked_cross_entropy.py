"""The loss from the head's input, a few tokens at a time, against F.cross_entropy of the whole logits x W^T."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.tensor_parallel.support import CPU, collectives, fill, on_ranks, part, random, results, whole_gradient
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.collectives import copy_to_group
from tptrain.tensor_parallel.communication import shard_bounds
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX, Vocabulary, chunked_cross_entropy
from tptrain.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding, head_of
from tptrain.tensor_parallel.parameter import compute_in, local_part

TOKENS, HIDDEN = 11, 6
CHUNKS = (1, 5, TOKENS, 100)


def drawn_targets(vocabulary: int) -> Tensor:
    targets = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(2))
    targets[:3] = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    targets[4] = targets[10] = IGNORE_INDEX
    return targets


def head_layer(mesh: Mesh, rows: int, weight: Tensor, tied: bool = False) -> ColumnParallelLinear | VocabParallelEmbedding:
    """A head of so many rows; those beyond `weight` are padding, and filled with huge values."""
    layer = VocabParallelEmbedding(rows, HIDDEN, mesh.tp, CPU) if tied else ColumnParallelLinear(HIDDEN, rows, False, mesh.tp, CPU)
    fill(layer.weight, torch.cat((weight, torch.full((rows - len(weight), HIDDEN), 1e30))))
    return layer


def check(mesh: Mesh, vocabulary: int, rows: int, smoothing: float, chunk: int, tied: bool = False, scale: float = 1.0) -> None:
    weight, x_values, targets = scale * random(vocabulary, HIDDEN, seed=1), random(TOKENS, HIDDEN, seed=2), drawn_targets(vocabulary)
    layer = head_layer(mesh, rows, weight, tied)
    start, _ = shard_bounds(rows, mesh.tp_size, mesh.tp_rank)
    twin_weight = weight.clone().requires_grad_()
    for micro_batch in range(2):
        x, twin_x = ((x_values + micro_batch).requires_grad_() for _ in range(2))
        kept = x.detach().clone(), targets.clone()
        loss = chunked_cross_entropy(
            copy_to_group(x, mesh.tp_group), head_of(layer), targets, Vocabulary(start, vocabulary, mesh.tp_group), smoothing, chunk
        )  # fmt: skip
        expected = F.cross_entropy(
            twin_x @ twin_weight.t(), targets, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=smoothing
        )  # fmt: skip
        assert loss.dtype == torch.float32
        assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        gradient = random(TOKENS, seed=3 + micro_batch)
        loss.backward(gradient)
        expected.backward(gradient)
        assert_close(x.grad, twin_x.grad, rtol=1e-5, atol=1e-5 * scale)
        assert torch.equal(x, kept[0])
        assert torch.equal(targets, kept[1])
    whole = whole_gradient(layer.weight)
    assert_close(whole[:vocabulary], twin_weight.grad, rtol=1e-5, atol=1e-5)
    assert (whole[vocabulary:] == 0).all(), "padding has a gradient"


@on_ranks()
def test_loss_and_gradients_for_any_chunk_size(mesh: Mesh) -> None:
    for vocabulary, smoothing, chunk in product((257, 5, 4), (0.0, 0.1), CHUNKS):
        check(mesh, vocabulary, vocabulary, smoothing, chunk)
    for smoothing, chunk in product((0.0, 0.1), (5, 100)):
        check(mesh, 257, 257, smoothing, chunk, tied=True)
        check(mesh, 257, 257, smoothing, chunk, scale=100)


@on_ranks()
def test_padding_rows_of_a_chunked_head_count_for_nothing(mesh: Mesh) -> None:
    """Of 10 tokens in 16 rows over 4 ranks, the third has two rows of padding and the fourth nothing else."""
    for smoothing, chunk in product((0.0, 0.1), (1, 5, 100)):
        check(mesh, 10, 16, smoothing, chunk)


@on_ranks()
def test_ignored_targets_of_a_chunk_have_no_loss_and_no_gradient(mesh: Mesh) -> None:
    layer = head_layer(mesh, 7, random(7, HIDDEN, seed=1))
    start, _ = shard_bounds(7, mesh.tp_size, mesh.tp_rank)
    vocabulary = Vocabulary(start, 7, mesh.tp_group)
    for smoothing, chunk in product((0.0, 0.1), (1, 5)):
        x = random(TOKENS, HIDDEN, seed=2).requires_grad_()
        targets = drawn_targets(7)
        ignored = targets == IGNORE_INDEX
        loss = chunked_cross_entropy(copy_to_group(x, mesh.tp_group), head_of(layer), targets, vocabulary, smoothing, chunk)
        loss.sum().backward()
        assert (loss[ignored] == 0).all()
        assert (x.grad[ignored] == 0).all()
        assert (loss[~ignored] > 0).all()
    layer.weight.grad = None
    nothing = torch.full((TOKENS,), IGNORE_INDEX)
    chunked_cross_entropy(x, head_of(layer), nothing, vocabulary, 0.1, 5).sum().backward()
    assert (local_part(layer.weight.grad) == 0).all()


@on_ranks()
def test_two_collectives_whatever_the_number_of_chunks(mesh: Mesh) -> None:
    layer = head_layer(mesh, 64, random(64, HIDDEN, seed=1))
    start, _ = shard_bounds(64, mesh.tp_size, mesh.tp_rank)
    for smoothing, chunk in product((0.0, 0.1), CHUNKS):
        x = random(TOKENS, HIDDEN, seed=2).requires_grad_()
        with collectives() as forward:
            loss = chunked_cross_entropy(x, head_of(layer), drawn_targets(64), Vocabulary(start, 64, mesh.tp_group), smoothing, chunk)
        with collectives() as backward:
            loss.sum().backward()
        assert forward == ({} if mesh.tp_size == 1 else {"allreduce": 2})
        assert backward == {}


@on_ranks()
def test_no_tensor_of_all_tokens_logits_exists(mesh: Mesh) -> None:
    """Neither direction makes more than a chunk of the local logits at a time, nor keeps one from forward for backward."""
    tokens, vocabulary, chunk = 64, 240, 4
    width = vocabulary // mesh.tp_size
    layer = head_layer(mesh, vocabulary, random(vocabulary, HIDDEN, seed=1))
    start, _ = shard_bounds(vocabulary, mesh.tp_size, mesh.tp_rank)
    x = random(tokens, HIDDEN, seed=2).requires_grad_()
    targets = torch.arange(tokens)
    saved: list[Tensor] = []
    for smoothing in (0.0, 0.1):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor)
        with results() as made:
            with hooks:
                loss = chunked_cross_entropy(x, head_of(layer), targets, Vocabulary(start, vocabulary, mesh.tp_group), smoothing, chunk)
            loss.sum().backward()
        sizes = [tensor.numel() for _, tensor in made]
        assert ("mm", torch.Size((chunk, width))) in [(name, tensor.shape) for name, tensor in made], "what this test watches for"
        assert max(sizes) <= max(chunk * width, tokens * HIDDEN, width * HIDDEN) < tokens * width
        assert {tensor.shape for tensor in saved} == {(tokens, HIDDEN), (tokens,)}


@on_ranks("tp1", "tp4")
def test_chunks_add_to_the_gradient_in_place(mesh: Mesh) -> None:
    layer = head_layer(mesh, 64, random(64, HIDDEN, seed=1))
    start, stop = shard_bounds(64, mesh.tp_size, mesh.tp_rank)
    vocabulary = Vocabulary(start, 64, mesh.tp_group)
    places = []
    for _ in range(2):
        loss = chunked_cross_entropy(random(TOKENS, HIDDEN, seed=2).requires_grad_(), head_of(layer), drawn_targets(64), vocabulary, 0.1, 5)
        with results() as made:
            loss.sum().backward()
        place = local_part(layer.weight.grad).data_ptr()
        places.append(place)
    ours = {place, local_part(layer.weight).data_ptr()}
    assert places[0] == places[1]
    assert [name for name, tensor in made if tensor.shape == (stop - start, HIDDEN) and tensor.data_ptr() not in ours] == []


@on_ranks()
def test_chunked_loss_in_bf16(mesh: Mesh) -> None:
    """Against the twin of the rounded weights and inputs; the logits have 8 bits, the loss and the weight's gradient are fp32."""
    weight, targets = random(32, HIDDEN, seed=1), drawn_targets(32)
    layer = head_layer(mesh, 32, weight)
    compute_in(layer, torch.bfloat16)
    start, _ = shard_bounds(32, mesh.tp_size, mesh.tp_rank)
    x = random(TOKENS, HIDDEN, seed=2).bfloat16().requires_grad_()
    loss = chunked_cross_entropy(
        copy_to_group(x, mesh.tp_group), head_of(layer), targets, Vocabulary(start, 32, mesh.tp_group), 0.1, 5
    )  # fmt: skip
    twin_x, twin_weight = x.detach().float().requires_grad_(), weight.bfloat16().float().requires_grad_()
    expected = F.cross_entropy(twin_x @ twin_weight.t(), targets, reduction="none", label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    loss.sum().backward()
    expected.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert_close(x.grad.float(), twin_x.grad, rtol=5e-2, atol=5e-2)
    assert layer.weight.grad.dtype == torch.float32
    assert_close(local_part(layer.weight.grad), part(twin_weight.grad, 0, mesh.tp_size, mesh.tp_rank), rtol=5e-2, atol=5e-2)
