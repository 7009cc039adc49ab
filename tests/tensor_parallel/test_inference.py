"""The forward-only layers against their serial twins from torch.nn; their buffers; the split cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import collectives, fill, mesh_of, part, random
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.inference import ForwardOnly, KeyValueCache
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, SharedColumnLinear, VocabParallelEmbedding

CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_forward_only_layers_equal_their_serial_twins(world: int) -> None:
    run_ranks(world, check_all)


@torch.no_grad()
def check_all(rank: int) -> None:
    mesh = mesh_of(tp=torch.distributed.get_world_size())
    for bias in (True, False):
        check_columns(mesh, bias)
        check_row(mesh, bias)
    for vocabulary in (257, 5):
        check_embedding_and_logits(mesh, vocabulary)
    check_shared_column(mesh)
    check_buffers(mesh)
    check_cache(mesh)


def filled(layer: torch.nn.Module, seed: int) -> list[torch.Tensor | None]:
    """Fill a layer at random; its whole weight and bias."""
    whole = []
    for number, name in enumerate(("weight", "bias")):
        parameter = getattr(layer, name, None)
        values = None if parameter is None else random(*parameter.shape, seed=seed + number)
        if parameter is not None:
            fill(parameter, values)
        whole.append(values)
    return whole


def check_columns(mesh: Mesh, bias: bool) -> None:
    """Two layers of one input, of different and uneven widths, and one whose output is gathered."""
    layers = [ColumnParallelLinear(6, out, bias, mesh.tp, CPU, gather_output=out == 7) for out in (8, 5, 7)]
    twins = [filled(layer, 10 * i) for i, layer in enumerate(layers)]
    x = random(3, 6, seed=3)
    with collectives() as counts:
        outputs = ForwardOnly().columns("here", x, layers[:2])
    assert counts == {}
    outputs += ForwardOnly().columns("here", x, layers[2:])
    for layer, y, (weight, whole_bias) in zip(layers, outputs, twins, strict=True):
        expected = F.linear(x, weight, whole_bias)
        assert_close(y, expected if layer.gather_output else part(expected, -1, mesh.tp_size, mesh.tp_rank))


def check_row(mesh: Mesh, bias: bool) -> None:
    for parallel in (True, False):
        layer = RowParallelLinear(8, 5, bias, mesh.tp, CPU, input_is_parallel=parallel)
        weight, whole_bias = filled(layer, 20)
        x = random(3, 8, seed=4)
        mine = part(x, -1, mesh.tp_size, mesh.tp_rank) if parallel else x
        with collectives() as counts:
            y = ForwardOnly().row("here", mine, layer)
        assert counts == ({"allreduce": 1} if mesh.tp_size > 1 else {})
        assert_close(y, F.linear(x, weight, whole_bias))


def check_embedding_and_logits(mesh: Mesh, vocabulary: int) -> None:
    """A vocabulary that no size divides: with 5 rows on 4 ranks the last one has none."""
    table = VocabParallelEmbedding(vocabulary, 6, mesh.tp, CPU)
    weight, _ = filled(table, 30)
    tokens = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(5))
    run = ForwardOnly()
    assert torch.equal(run.embedding("here", tokens, table), weight[tokens])
    assert_close(run.logits("there", random(3, 6, seed=6), table), part(random(3, 6, seed=6) @ weight.t(), -1, mesh.tp_size, mesh.tp_rank))


def check_shared_column(mesh: Mesh) -> None:
    """Fewer heads than ranks: with 2 of them on 4 ranks, ranks 0 and 1 make the first, 2 and 3 the second."""
    blocks = max(1, mesh.tp_size // 2)
    layer = SharedColumnLinear(6, 4 * blocks, blocks, True, mesh.tp, CPU)
    weight, bias = filled(layer, 40)
    x = random(3, 6, seed=7)
    block = mesh.tp_rank * blocks // mesh.tp_size
    assert_close(ForwardOnly().columns("here", x, [layer])[0], F.linear(x, weight, bias)[:, 4 * block : 4 * block + 4])


def check_buffers(mesh: Mesh) -> None:
    """The same memory at every call, also after a larger input; another place is other memory."""
    column, row = ColumnParallelLinear(6, 8, True, mesh.tp, CPU), RowParallelLinear(8, 6, True, mesh.tp, CPU)
    table = VocabParallelEmbedding(257, 6, mesh.tp, CPU)
    for seed, layer in enumerate((column, row, table)):
        filled(layer, 50 + 2 * seed)
    run, seen = ForwardOnly(), []
    for tokens in (7, 2, 2, 5):
        x = run.embedding("embedding", torch.arange(tokens), table)
        inner = run.columns("up", x, [column])[0]
        y = run.row("down", inner, row)
        assert not y.requires_grad
        assert y.shape == (tokens, 6)
        seen.append((x.data_ptr(), inner.data_ptr(), y.data_ptr()))
    assert len(set(seen)) == 1
    assert len(set(seen[0])) == 3
    assert run.columns("up", random(8, 6, seed=8), [column])[0].shape == (8, 8 // mesh.tp_size), "larger than the buffer so far"
    with pytest.raises(ValueError, match="sequence_parallel"):
        run.columns("up", x, [ColumnParallelLinear(6, 8, True, mesh.tp, CPU, sequence_parallel=True)])


def check_cache(mesh: Mesh) -> None:
    def cache(kv_heads: int) -> KeyValueCache:
        return KeyValueCache(2, 3, kv_heads, 10, 4, mesh.tp_group, torch.bfloat16, CPU)

    whole = 2 * 2 * 3 * 8 * 10 * 4 * 2  # layers, k and v, rows, heads, tokens, width, bytes
    assert cache(8).bytes * mesh.tp_size == whole
    assert cache(1).bytes == whole // 8, "each rank has the one head"
    if mesh.tp_size > 1:
        with pytest.raises(ValueError, match="3 key/value heads"):
            cache(3)
    keys, values = random(3, 8 // mesh.tp_size, 10, 4, seed=9).bfloat16(), random(3, 8 // mesh.tp_size, 10, 4, seed=10).bfloat16()
    filled_cache, pointers = cache(8), set()
    for start, stop in ((0, 5), (5, 6), (6, 10)):
        for layer in range(2):
            k, v = filled_cache.extend(layer, keys[:, :, start:stop] + layer, values[:, :, start:stop] - layer)
            assert torch.equal(k, keys[:, :, :stop] + layer)
            assert torch.equal(v, values[:, :, :stop] - layer)
            pointers.add((layer, k.data_ptr(), v.data_ptr()))
        filled_cache.advance(stop - start)
    assert len(pointers) == 2
    with pytest.raises(ValueError, match="11 tokens are more than the 10"):
        filled_cache.extend(0, keys[:, :, :1], values[:, :, :1])
