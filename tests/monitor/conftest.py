"""A resolved config for the monitor room, which needs neither Hydra nor torch."""

import logging
import os
from collections.abc import Iterator

import pytest

from tests.support import small_config
from tests.wandb_server import KEY
from tptrain.config import Config


@pytest.fixture
def config() -> Config:
    return small_config(
        seed=1234,
        model__name="gpt_tiny", model__hidden_size=128, model__num_heads=8, model__ffn_hidden_size=512, model__max_seq_len=256,
        parallel__tp=2, parallel__pp=2, parallel__micro_batch_size=4, parallel__micro_batches=8,
        train__max_steps=600, train__global_batch_size=None, train__log_every=10, train__eval_every=200, train__eval_steps=8,
        train__sample_tokens=300, data__source="python_docs", data__seq_len=256,
        wandb__mode="offline", wandb__tags=["a", "b"], launch__threads_per_rank="auto", launch__timeout_seconds=600.0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """Each test gets the logger "tptrain" as Python makes it, and leaves it as it was."""
    logger = logging.getLogger("tptrain")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, settings or cache of whoever runs the tests, and a key in the environment that is to stay there."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
