"""A resolved config, made by hand: this room needs neither Hydra nor torch."""

import logging
from collections.abc import Iterator

import pytest

from tptrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    HardwareConfig,
    LaunchConfig,
    LrScheduleConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    WandbConfig,
    resolve,
)


@pytest.fixture
def config() -> Config:
    return resolve(
        Config(
            seed=1234,
            model=ModelConfig("gpt_tiny", 257, 128, 4, 8, None, 512, 256, "learned", "layernorm", "gelu", True, True, 0.0),
            parallel=ParallelConfig(2, 2, 1, False, 4, 8, "1f1b", 1, "none"),
            train=TrainConfig(600, "fp32", None, 10, 200, 8, False, None, 300),
            data=DataConfig("python_docs", 256),
            optimizer=OptimizerConfig("adamw", 1e-3, [0.9, 0.95], 1e-8, 0.1, 1.0),
            lr_schedule=LrScheduleConfig("cosine", 40, 0.1),
            checkpoint=CheckpointConfig(0, 2, False, "auto"),
            wandb=WandbConfig("offline", "tptrain", None, None, ["a", "b"]),
            hardware=HardwareConfig("cpu", None),
            launch=LaunchConfig("auto", 600.0),
        )
    )


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
