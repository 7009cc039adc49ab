"""What single values of a config may be, whatever the others are."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from tptrain.config_error import as_text, refuse
from tptrain.data_config import check_data
from tptrain.hardware_config import check_hardware
from tptrain.launch_config import check_launch
from tptrain.plan_config import check_plan
from tptrain.schema import Config

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.position": ("learned", "rope"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "swiglu"),
    "parallel.recompute": ("none", "selective", "full"),
    "train.precision": ("fp32", "bf16"),
    "train.compile": (False,),
    "optimizer.name": ("adamw", "sgd"),
    "lr_schedule.name": ("cosine", "constant"),
    "wandb.mode": ("offline", "online", "disabled"),
    "check.layouts": ("own", "all"),
}
"""What keys of few values may be."""

_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "model.vocab_size": 2, "model.hidden_size": 1, "model.num_layers": 1, "model.num_heads": 1,
    "model.num_kv_heads": 1, "model.ffn_hidden_size": 1, "model.max_seq_len": 1, "model.init_std": 0, "model.dropout": 0,
    "parallel.tp": 1, "parallel.pp": 1, "parallel.micro_batch_size": 1, "parallel.micro_batches": 1,
    "train.max_steps": 0, "train.global_batch_size": 1, "train.log_every": 1, "train.eval_every": 0,
    "train.eval_steps": 0, "train.sample_tokens": 0, "train.loss_chunk_tokens": 1, "train.label_smoothing": 0,
    "train.max_skipped_steps": 0, "train.max_restarts": 0, "data.seq_len": 1,
    "optimizer.lr": 0, "optimizer.weight_decay": 0, "optimizer.momentum": 0,
    "lr_schedule.warmup_steps": 0, "lr_schedule.min_lr_ratio": 0,
    "checkpoint.every": 0, "checkpoint.keep": 1, "checkpoint.keep_every": 1, "wandb.upload_seconds": 0,
    "check.steps": 1, "check.processes": 1,
}  # fmt: skip

_ABOVE_ZERO = (
    "model.norm_eps", "model.rope_theta", "optimizer.eps", "launch.timeout_seconds", "launch.stop_seconds",
    "doctor.slow_rank", "doctor.slow_link", "checkpoint.timeout_seconds",
)  # fmt: skip
_ABOVE_ZERO_OR_NULL = ("optimizer.grad_clip", "train.max_minutes")
_AT_MOST_ONE = ("lr_schedule.min_lr_ratio",)
_BELOW_ONE = ("optimizer.momentum", "model.dropout", "train.label_smoothing", "doctor.slow_rank", "doctor.slow_link")
_INT_OR_AUTO = ("parallel.dp", "parallel.stages_per_rank", "launch.threads_per_rank", "launch.processes_per_node")
STAGES_PER_RANK: dict[str, int | None] = {"gpipe": None, "1f1b": 1, "interleaved": None, "zb_h1": 1, "zb_v": 2}
"""For each schedule that has a name, the stages that a rank must hold; None: any number."""


def check_values(config: Config) -> None:
    """Each key by itself."""
    for key, choices in CHOICES.items():
        value = _get(config, key)
        if value not in choices:
            options = ", ".join(as_text(choice) for choice in choices)
            rule, remedy = ("is not available", f"use {options}") if len(choices) == 1 else ("is unknown", f"use one of {options}")
            raise refuse(key, value, rule, remedy)
    for key, least in _AT_LEAST.items():
        value = _get(config, key)
        if value is not None and not value >= least:
            raise refuse(key, value, f"is below {least}", f"use {least} or more")
    for key in (*_ABOVE_ZERO, *_ABOVE_ZERO_OR_NULL):
        value, or_null = _get(config, key), key in _ABOVE_ZERO_OR_NULL
        if not (or_null and value is None) and not value > 0:
            raise refuse(key, value, "is not above 0", f"use a positive number{', or null' * or_null}")
    if "://" in (config.checkpoint.dir or ""):
        rule = "is a URL, and a checkpoint is made complete by a rename, which only a file system has"
        raise refuse("checkpoint.dir", config.checkpoint.dir, rule, "use a folder, such as one where that storage is mounted")
    for key in _AT_MOST_ONE:
        if _get(config, key) > 1:
            raise refuse(key, _get(config, key), "is above 1", "use a value from 0 to 1")
    for key in _BELOW_ONE:
        if _get(config, key) >= 1:
            raise refuse(key, _get(config, key), "is not below 1", "use a value from 0 up to, not including, 1")
    for key in _INT_OR_AUTO:
        value = _get(config, key)
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            raise refuse(key, value, "is neither auto nor a positive integer", "use auto, 1, 2, ...")
    if not all(step >= 1 for step in config.train.trace_steps):
        raise refuse("train.trace_steps", config.train.trace_steps, "has a step below 1", "use a list of steps such as [5], or []")
    if config.train.spike_factor is not None and not config.train.spike_factor > 1:
        rule = "is not above 1, so that every loss above the mean were a spike"
        raise refuse("train.spike_factor", config.train.spike_factor, rule, "use 2 or more, or null")
    if config.train.skip_spikes and config.train.spike_factor is None:
        raise refuse("train.skip_spikes", True, "has no spikes to skip, as train.spike_factor=null", "use train.spike_factor=2 or more")
    if config.train.tensorboard and find_spec("tensorboard") is None:
        rule = "needs the package tensorboard, which is not installed"
        raise refuse("train.tensorboard", True, rule, "pip install 'tptrain[tensorboard]', or use train.tensorboard=false")
    check_launch(config.launch)
    check_hardware(config.hardware)
    check_plan(config.plan)
    check_data(config.data)
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise refuse("optimizer.betas", betas, "is not two numbers from 0 up to 1", "use [0.9,0.95]")
    for key in ("optimizer.lr", "optimizer.weight_decay"):
        if not math.isfinite(_get(config, key)):
            raise refuse(key, _get(config, key), "is not finite", "use a number")


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
