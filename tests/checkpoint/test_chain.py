"""A training that goes on under one layout after another, on 1 to 8 processes, is the training of one process that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tptrain.config import Config

STEPS = 10
"""Under each layout."""
LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2},
    {"dp": 3},
    {"tp": 2, "pp": 2, "schedule": "1f1b", "sequence_parallel": True},
    {"pp": 5, "schedule": "gpipe"},
    {"tp": 1},
    {"pp": 2, "dp": 2, "schedule": "zb_v"},
    {"tp": 2, "dp": 3},
    {"pp": 7, "schedule": "zb_h1"},
    {"tp": 4, "sequence_parallel": True},
    {"tp": 2, "pp": 2, "dp": 2, "schedule": "interleaved", "stages_per_rank": 2, "sequence_parallel": True},
    {"schedule": "zb_v"},
    {"tp": 1},
]  # fmt: skip
LAST = STEPS * len(LAYOUTS)
MODELS: dict[str, dict[str, Any]] = {
    "gpt, tied": {"model__tie_embeddings": True, "model__dropout": 0.1},
    "llama, untied": {
        "model__tie_embeddings": False, "model__position": "rope", "model__norm": "rmsnorm", "model__activation": "swiglu",
        "model__bias": False, "model__num_kv_heads": 2,
    },
}  # fmt: skip


def config_of(model: dict[str, Any], layout: dict[str, Any]) -> Config:
    """Seven layers, and a vocabulary that neither 2 nor 4 ranks split evenly. A pipeline gets two micro-batches, others one."""
    rows = 12 // layout.get("dp", 1) // (2 if layout.get("pp", 1) > 1 else 1)
    return small_config(
        model__num_layers=7, model__hidden_size=16, model__ffn_hidden_size=32, model__vocab_size=251, train__max_steps=LAST,
        train__global_batch_size=12, parallel__micro_batches=None, parallel__micro_batch_size=rows, checkpoint__async_save=True,
        **model, **{f"parallel__{key}": value for key, value in layout.items()},
    )  # fmt: skip


def go_on(rank: int, folder: Path, layout: dict[str, Any], steps: int) -> dict[str, tuple[list[float], dict[str, np.ndarray]]]:
    """Of each model the losses of the next steps under a layout, and all of its state where one process has it."""
    from tptrain.checkpoint.saver import Saver
    from tptrain.checkpoint.sharded import training_tensors
    from tptrain.data.dataset import Data
    from tptrain.mesh import background_group, build_mesh
    from tptrain.train import resume, save_checkpoint
    from tptrain.trainer import Trainer

    group, found = background_group(120), {}
    for name, keys in MODELS.items():
        config = config_of(keys, layout)
        mesh = build_mesh(config.parallel, torch.device("cpu"), 120)
        trainer = Trainer(config, mesh, Data.of_tokens(config, skewed_tokens(4000, config.model.vocab_size)))
        saver = Saver(folder / name, config.checkpoint, group)
        resume(trainer, folder / name, group)
        losses = []
        for _ in range(steps):
            losses.append(trainer.step().loss)
            saver.prepare(trainer.share.owned_parameters(), trainer.optimizer)
        save_checkpoint(trainer, saver)
        saver.finish()
        state = training_tensors(trainer.share.owned_parameters(), trainer.optimizer) if config.processes == 1 else {}
        found[name] = losses, {key: getattr(value, "to_local", lambda value=value: value)().numpy().copy() for key, value in state.items()}
    return found


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each layout found, one after the other."""
    folder = tmp_path_factory.mktemp("chain")
    return [run_ranks(config_of({}, layout).processes, go_on, folder, layout, STEPS)[0] for layout in LAYOUTS]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same steps by one process."""
    (found,) = run_ranks(1, go_on, tmp_path_factory.mktemp("unbroken"), {}, LAST)
    return found


def test_the_chain_is_what_it_should_be() -> None:
    """At least twelve layouts, 1 to 8 processes, and every schedule."""
    layouts = [config_of({}, layout).parallel for layout in LAYOUTS]
    assert len({tuple(layout.items()) for layout in LAYOUTS}) >= 12
    assert {layout.tp * layout.pp * int(layout.dp) for layout in layouts} == set(range(1, 9))
    assert {layout.schedule for layout in layouts} == {"gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_moments_are_those_of_one_process(model: str, chained: list[dict[str, Any]], unbroken: dict[str, Any]) -> None:
    losses, state = unbroken[model]
    found = [loss for layout in chained for loss in layout[model][0]]
    assert len(found) == len(losses) == LAST
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(found, losses, rtol=1e-5, atol=0)
    last = chained[-1][model][1]
    assert last.keys() == state.keys()
    assert sum("exp_avg_sq" in key for key in last) == sum(key.startswith("model.") for key in last)
    for key, expected in state.items():
        apart, size = np.linalg.norm(last[key] - expected), np.linalg.norm(expected)
        print(model, key, apart / max(size, 1e-30))
        if "attention.k.bias" in key and not key.endswith(".step"):
            # It adds one number to all scores of a query: its gradient is zero but for rounding, which AdamW scales up.
            assert max(apart, size) < 1e-2 * np.linalg.norm(state[key.replace("k.bias", "q.bias")])
        else:
            assert apart <= 1e-4 * size, key
