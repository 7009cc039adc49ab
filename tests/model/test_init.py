"""Initial values belong to the logical tensor: the same bits under every layout, and of the right distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.support import small_config
from tests.tensor_parallel.support import mesh_of, part
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.gpt import GPTStage
from tptrain.model.init import draw_block, initialise, rows_per_block

CPU = torch.device("cpu")
SEED = 7
# Several blocks of rows in the table (2730 of 5003 rows), in `up` and in `down` (10 of 24 rows, split over columns),
# and none of the splits over 2, 3 or 4 ranks ends where a block ends.
MODEL = replace(
    small_config().model, vocab_size=5003, hidden_size=24, num_layers=2, num_heads=12, ffn_hidden_size=6000, tie_embeddings=False
)


def initial_values(model: ModelConfig, mesh: Mesh, seed: int = SEED, layers: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """This rank's parts after `initialise`, which must write every element."""
    first, last = layers or (0, model.num_layers)
    stage = GPTStage(model, first, last, mesh.tp, CPU)
    for parameter in stage.parameters():
        parameter.data.to_local().fill_(torch.nan)
    initialise(stage, model, seed)
    return {name: parameter.data.to_local().clone() for name, parameter in stage.named_parameters()}


def drawn(name: str, shape: tuple[int, ...], std: float, seed: int = SEED) -> torch.Tensor:
    """The whole matrix: its blocks, one below the other."""
    blocks = range(math.ceil(shape[0] / rows_per_block(shape[1])))
    return torch.from_numpy(np.concatenate([draw_block(seed, name, i, *shape) for i in blocks]) * np.float32(std))


def split_dim(name: str) -> int | None:
    """Which dimension tp splits, by what the layer is."""
    layer, kind = name.split(".")[-2:]
    if layer in ("q", "k", "v", "gate", "up", "embedding", "head"):
        return 0
    return 1 if layer in ("out", "down") and kind == "weight" else None


def test_one_rank_has_the_drawn_values(mesh: Mesh) -> None:
    values = initial_values(MODEL, mesh)
    residual = MODEL.init_std / math.sqrt(2 * MODEL.num_layers)
    for name, value in values.items():
        if name.endswith("bias"):
            assert (value == 0).all(), name
        elif name.endswith("norm.weight"):
            assert (value == 1).all(), name
        else:
            std = residual if name.endswith(("out.weight", "down.weight")) else MODEL.init_std
            assert torch.equal(value, drawn(name, tuple(value.shape), std)), name


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_every_split_has_the_same_bits(mesh: Mesh, tp: int) -> None:
    whole = initial_values(MODEL, mesh)
    parts = run_ranks(tp, initial_part, tp)
    for rank, values in enumerate(parts):
        assert values.keys() == whole.keys()
        for name, value in values.items():
            assert np.array_equal(value, part(whole[name], split_dim(name), tp, rank).numpy()), (name, rank)


def initial_part(rank: int, tp: int, model: ModelConfig = MODEL) -> dict[str, Any]:
    return {name: value.numpy() for name, value in initial_values(model, mesh_of(tp=tp)).items()}


LLAMA = replace(MODEL, num_heads=8, num_kv_heads=2, ffn_hidden_size=6008, bias=False, position="rope", norm="rmsnorm", activation="swiglu")


@pytest.mark.parametrize("tp", [2, 4])
def test_every_split_of_the_second_family_has_the_same_bits(mesh: Mesh, tp: int) -> None:
    """At tp 4 there are fewer key/value heads than ranks, and all hold both."""
    whole = initial_values(LLAMA, mesh)
    residual = LLAMA.init_std / math.sqrt(2 * LLAMA.num_layers)
    for name, value in whole.items():
        std = residual if name.endswith(("out.weight", "down.weight")) else LLAMA.init_std
        assert torch.equal(value, torch.ones(24) if value.ndim == 1 else drawn(name, tuple(value.shape), std)), name
    for rank, values in enumerate(run_ranks(tp, initial_part, tp, LLAMA)):
        assert values.keys() == whole.keys()
        for name, value in values.items():
            shared = tp == 4 and name.split(".")[-2] in ("k", "v")
            assert np.array_equal(value, part(whole[name], None if shared else split_dim(name), tp, rank).numpy()), (name, rank)


def test_every_cut_into_stages_has_the_same_bits(mesh: Mesh) -> None:
    model = replace(MODEL, num_layers=3, ffn_hidden_size=96, tie_embeddings=True)
    whole = initial_values(model, mesh)
    seen: set[str] = set()
    for layers in ((0, 2), (2, 3)):
        for name, value in initial_values(model, mesh, layers=layers).items():
            assert torch.equal(value, whole[name]), name
            seen.add(name)
    assert seen == whole.keys()


def test_values_depend_on_the_seed_and_on_nothing_else(mesh: Mesh) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = initial_values(MODEL, mesh)
    assert all(torch.equal(value, first[name]) for name, value in initial_values(MODEL, mesh).items())
    for name, value in initial_values(MODEL, mesh, SEED + 1).items():
        assert value.ndim != 2 or not torch.isclose(value, first[name]).all(), name


def test_blocks_cover_the_rows_once() -> None:
    for rows, columns in ((1, 1), (7, 3), (1, 1 << 16), (3, 1 << 17), (5003, 24), (65536, 1), (65537, 1)):
        size = rows_per_block(columns)
        assert size >= 1
        assert size == 1 or size * columns <= 1 << 16
        blocks = math.ceil(rows / size)
        shapes = [draw_block(1, "w", i, rows, columns).shape for i in range(blocks)]
        assert shapes == [(size, columns)] * (blocks - 1) + [(rows - size * (blocks - 1), columns)]
    assert draw_block(1, "w", 0, 7, 3).dtype == np.float32


def test_a_block_depends_on_its_key_alone() -> None:
    here = draw_block(7, "layers.0.mlp.up.weight", 1, 400, 500)
    assert np.array_equal(here, draw_block(7, "layers.0.mlp.up.weight", 1, 400, 500))
    assert np.array_equal(here[:100], draw_block(7, "layers.0.mlp.up.weight", 1, 231, 500)), "a longer matrix starts alike"
    others = [
        draw_block(8, "layers.0.mlp.up.weight", 1, 400, 500),
        draw_block(7, "layers.1.mlp.up.weight", 1, 400, 500),
        draw_block(7, "layers.0.mlp.up.weight", 0, 400, 500),
        draw_block(7, "layers.0.mlp.up.weight", 2, 400, 500),
        draw_block(71, "layers.0.mlp.up.weight", 1, 400, 500),
    ]
    for i, one in enumerate([here, *others]):
        for other in others[i:]:
            assert abs(correlation(one, other)) < 5 / math.sqrt(one.size)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_distribution(mesh: Mesh) -> None:
    for layers in (2, 8):
        model = replace(MODEL, num_layers=layers, hidden_size=96, ffn_hidden_size=384)
        values = {name: value.numpy() for name, value in initial_values(model, mesh).items()}
        for name, value in values.items():
            if value.ndim < 2:
                continue
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
            assert value.std() == pytest.approx(std, rel=5 / math.sqrt(2 * value.size)), name
            assert abs(value.mean()) < 5 * std / math.sqrt(value.size), name
            within = 0.6827  # of a normal distribution lies within one standard deviation
            assert (abs(value) < std).mean() == pytest.approx(within, abs=5 * math.sqrt(within * (1 - within) / value.size)), name


def test_parameters_are_uncorrelated(mesh: Mesh) -> None:
    """No two of a shape share their values, and no two blocks of one parameter do."""
    values = {name: value.numpy() for name, value in initial_values(replace(MODEL, num_layers=3), mesh).items() if value.ndim == 2}
    names = sorted(values)
    pairs = 0
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if values[one].shape == values[other].shape:
                pairs += 1
                assert abs(correlation(values[one], values[other])) < 5 / math.sqrt(values[one].size), (one, other)
    assert pairs > 60
    up, size = values["layers.0.mlp.up.weight"], rows_per_block(24)
    assert abs(correlation(up[:size], up[size : 2 * size])) < 5 / math.sqrt(size * 24)
