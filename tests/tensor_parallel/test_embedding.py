"""The split table against torch.nn.Embedding, and the head that makes logits with it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.tensor_parallel.support import CPU, SPLIT, check_gradients, fill, load, on_ranks, part, random, whole_gradient
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding, head_of
from tptrain.tensor_parallel.parameter import local_part, partial_gradients

MICRO_BATCHES, SEQUENCE = 3, 12


@on_ranks()
def test_embedding_of_a_vocabulary_that_tp_does_not_divide_is_its_twin(mesh: Mesh) -> None:
    for vocabulary, sequence_parallel in product((257, 5, 4), (True, False)):
        twin = nn.Embedding(vocabulary, 6)
        twin.weight.data = random(vocabulary, 6, seed=1)
        layer = VocabParallelEmbedding(vocabulary, 6, mesh.tp, CPU, sequence_parallel=sequence_parallel)
        load(layer, twin)
        dim = 1 if sequence_parallel else None
        for i in range(MICRO_BATCHES):
            gradient = random(2, SEQUENCE, 6, seed=40 + i)
            tokens = torch.randint(vocabulary, (2, SEQUENCE), generator=torch.Generator().manual_seed(i))  # some of them twice
            tokens[0, :3] = torch.tensor([0, vocabulary - 1, vocabulary // 2])
            tokens[1] = tokens[0].flip(0)
            kept = tokens.clone()
            y, expected = layer(tokens), twin(tokens)
            assert_close(y, part(expected, dim, mesh.tp_size, mesh.tp_rank))
            y.backward(part(gradient, dim, mesh.tp_size, mesh.tp_rank))
            expected.backward(gradient)
            assert torch.equal(tokens, kept)
        check_gradients(layer, twin, mesh.tp_group)
        assert partial_gradients(layer) == []


@on_ranks()
def test_every_token_has_one_owner(mesh: Mesh) -> None:
    """Over 4 ranks, 5 rows are 2, 2, 1 and none; a rank that owns nothing takes part all the same."""
    layer = VocabParallelEmbedding(5, 6, mesh.tp, CPU)
    if mesh.tp_size == 4:
        assert (layer.start, layer.stop) == [(0, 2), (2, 4), (4, 5), (5, 5)][mesh.tp_rank]
        assert local_part(layer.weight).shape == (layer.stop - layer.start, 6)
    fill(layer.weight, random(5, 6, seed=1))
    layer(torch.arange(5).view(1, 5)).sum().backward()
    assert_close(local_part(layer.weight.grad), torch.ones(layer.stop - layer.start, 6))
    assert_close(whole_gradient(layer.weight), torch.ones(5, 6))


@on_ranks("tp1")
def test_one_rank_refuses_tokens_outside_the_table(mesh: Mesh) -> None:
    layer = VocabParallelEmbedding(5, 6, mesh.tp, CPU)
    for token in (5, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([[token]]))


@on_ranks(*SPLIT)
def test_head_of_a_layer_is_its_part_of_the_weight(mesh: Mesh) -> None:
    for layer in (ColumnParallelLinear(6, 7, False, mesh.tp, CPU), VocabParallelEmbedding(7, 6, mesh.tp, CPU)):
        fill(layer.weight, random(7, 6, seed=1))
        head = head_of(layer)
        assert head.weight is layer.weight
        assert torch.equal(head.weight_values, part(random(7, 6, seed=1), 0, mesh.tp_size, mesh.tp_rank))
        assert head.bias is head.bias_values is head.rows is None
