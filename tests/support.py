"""A small config for tests, changed by dotted keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from tptrain.config import (
    CheckConfig,
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


def small_config(**changes: Any) -> Config:
    """A resolved config of a model that trains in milliseconds. Keys: `parallel__tp=2` sets parallel.tp."""
    config = Config(
        seed=7,
        model=ModelConfig(
            name="test", vocab_size=257, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=None, ffn_hidden_size=64,
            max_seq_len=16, position="learned", norm="layernorm", activation="gelu", bias=True, tie_embeddings=True, dropout=0.0,
        ),
        parallel=ParallelConfig(
            tp=1, pp=1, dp=1, sequence_parallel=False, micro_batch_size=2, micro_batches=4, schedule="1f1b",
            stages_per_rank="auto", recompute="none",
        ),
        train=TrainConfig(
            max_steps=20, precision="fp32", global_batch_size=8, log_every=1, eval_every=0, eval_steps=2, compile=False,
            loss_chunk_tokens=None, label_smoothing=0.0, init_from=None, sample_tokens=0,
        ),
        data=DataConfig(source="memorize", seq_len=16),
        optimizer=OptimizerConfig(name="adamw", lr=3e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, grad_clip=0.5),
        lr_schedule=LrScheduleConfig(name="cosine", warmup_steps=3, min_lr_ratio=0.1),
        checkpoint=CheckpointConfig(every=0, keep=2, async_save=False, resume="auto"),
        wandb=WandbConfig(mode="disabled", project="tptrain", name=None, group=None, tags=[]),
        hardware=HardwareConfig(device="cpu", peak_flops_per_second=None),
        launch=LaunchConfig(threads_per_rank=1, timeout_seconds=60),
        check=CheckConfig(steps=3, layouts="own", processes=4),
    )  # fmt: skip
    for key, value in changes.items():
        group, _, name = key.partition("__")
        setattr(getattr(config, group), name, value) if name else setattr(config, group, value)
    return resolve(config)


def skewed_tokens(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Token ids with something to learn: frequent small ids, and each id hints at the next."""
    generator = np.random.default_rng(seed)
    drawn = (vocab_size * generator.random(count) ** 3).astype(np.int64)
    return (np.where(generator.random(count) < 0.5, np.roll(drawn, 1) * 7 + 3, drawn) % vocab_size).astype(np.int64)


SMALL = [
    "hardware=cpu", "wandb=disabled", "data=memorize", "data.seq_len=16", "data.num_sequences=64", "data.vocab_size=64",
    "model.vocab_size=64", "model.hidden_size=32", "model.num_layers=4", "model.num_heads=4", "model.ffn_hidden_size=64",
    "model.max_seq_len=16", "parallel.micro_batch_size=2", "parallel.micro_batches=4",
    "train.global_batch_size=8", "train.log_every=1", "train.eval_every=5", "train.eval_steps=1",
]  # fmt: skip
"""The same small model on the command line, with random sequences to memorize."""
