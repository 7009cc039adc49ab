"""Tensors saved under one layout and loaded under another: weights and optimizer state, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.saving import save_now, start_from
from tests.support import skewed_tokens, small_config

LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2, "pp": 2}, {"dp": 4}, {"tp": 4}, {"pp": 2, "dp": 2, "schedule": "zb_v"}, {"pp": 2, "dp": 2, "schedule": "interleaved"},
    {"tp": 2, "dp": 2},
]  # fmt: skip


def config_of(layout: dict[str, Any], base: dict[str, Any]) -> Any:
    """A config under a layout."""
    return small_config(**base, **{f"parallel__{key}": size for key, size in layout.items()})


def assert_copies_are_equal(trainer: Any) -> None:
    """A tied embedding that a rank has twice, as table and as head, is the same twice, its optimizer state too."""
    seen: dict[str, Any] = {}
    for name, parameter in trainer.share.named_parameters():
        first = seen.setdefault(name, parameter)
        assert torch.equal(first.to_local(), parameter.to_local()), name
        for key, value in trainer.optimizer.state[parameter].items():
            other = trainer.optimizer.state[first][key]
            assert torch.equal(
                getattr(other, "to_local", lambda other=other: other)(), getattr(value, "to_local", lambda value=value: value)()
            )


def whole_state(trainer: Any) -> dict[str, np.ndarray]:
    """This stage's weights and optimizer state, whole."""
    from torch.distributed.tensor import DTensor

    from tptrain.checkpoint.sharded import training_tensors

    tensors = training_tensors(trainer.share.parameters(), trainer.optimizer)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).numpy().copy() for name, t in tensors.items()}


def walk(rank: int, folder: Path, base: dict[str, Any]) -> list[dict[str, Any]]:
    """Train and save under the first layout; load under each other one, and save again there for the next."""
    from tptrain.data.dataset import Data
    from tptrain.mesh import build_mesh
    from tptrain.trainer import Trainer

    seen = []
    for number, layout in enumerate(LAYOUTS):
        config = config_of(layout, base)
        tokens = skewed_tokens(2000, config.model.vocab_size)
        trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, tokens))
        if number == 0:
            for _ in range(3):
                trainer.step()
        else:
            config.checkpoint.resume = str(folder / f"run{number - 1}/checkpoints/step-00000003")
            start_from(trainer, folder / f"run{number}")
            assert trainer.steps_done == 3
            assert_copies_are_equal(trainer)
        seen.append({"state": whole_state(trainer), "samples": trainer.samples_done})
        save_now(trainer, folder / f"run{number}")
    return seen


UNTIED_SGD = {"model__tie_embeddings": False, "optimizer__name": "sgd", "optimizer__momentum": 0.9, "model__vocab_size": 250}


@pytest.mark.parametrize("base", [{}, UNTIED_SGD], ids=["tied, adamw", "untied, sgd"])
def test_any_layout_loads_any_other(base: dict[str, Any], tmp_path: Path) -> None:
    ranks = run_ranks(4, walk, tmp_path, base)
    reference: dict[str, np.ndarray] = {}
    for rank in ranks:
        reference |= rank[0]["state"]
    layers = small_config(**base).model.num_layers
    assert len([name for name in reference if name.endswith("attention.q.weight")]) == layers
    assert any(name.startswith("optimizer.") and np.abs(array).max() > 0 for name, array in reference.items())
    for number in range(1, len(LAYOUTS)):
        together: set[str] = set()
        for rank in ranks:
            together |= rank[number]["state"].keys()
            assert rank[number]["samples"] == 24
            for name, array in rank[number]["state"].items():
                assert np.array_equal(array, reference[name]), (LAYOUTS[number], name)
        assert together == reference.keys(), LAYOUTS[number]
    if config_of({}, base).model.tie_embeddings:
        check_embedding_is_saved_once(tmp_path / "run0/checkpoints/step-00000003")


def check_embedding_is_saved_once(folder: Path) -> None:
    """The tied embedding, which the first and the last stage hold, lies on disk once and without padding."""
    from tptrain.checkpoint.index import read_index

    stored = read_index(folder)
    assert [name for name in stored if "embedding" in name and name.startswith("model.")] == ["model.embedding.weight"]
    embedding = stored["model.embedding.weight"]
    assert embedding.shape == (257, 32)
    assert sum(tile.bytes for chunk in embedding.chunks.values() for tile in embedding.tiles(chunk)) == 4 * 257 * 32
