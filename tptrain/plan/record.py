"""`plan.json`: all that a plan knows, for programs. Keys carry their units; what is unknown is null, and `unknown` says why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tptrain.config import Config
from tptrain.plan.forecast import Forecast
from tptrain.plan.show import components, parts_of
from tptrain.plan.time import StepTime

VERSION = 1
"""Grows when a key changes its meaning or goes."""
NAME = "plan.json"


def as_json(content: Mapping[str, Any]) -> bytes:
    """The file's content."""
    return json.dumps({"version": VERSION, **content}, allow_nan=False).encode() + b"\n"


def of_forecast(forecast: Forecast) -> dict[str, Any]:
    """One layout."""
    config, time, training = forecast.config, forecast.time, forecast.training
    return {
        "layout": of_config(config),
        "hardware": dataclasses.asdict(config.hardware),
        "model": dataclasses.asdict(config.model),
        "sequence_tokens": config.data.seq_len,
        "precision": config.train.precision,
        "stages": [
            {"pp_rank": stage.rank, "first_layer": stage.first_layer, "last_layer": stage.last_layer - 1, "parameters": stage.parameters,
             "forward_flops_per_token": stage.forward_flops_per_token}
            for stage in forecast.pipeline.stages
        ],
        "memory": [
            {"pp_rank": rank.pp_rank, **{f"{name}_bytes": size for name, size in components(rank).items()}, "total_bytes": rank.total}
            for rank in forecast.ranks
        ],
        "missing_bytes": forecast.missing_bytes,
        "communication": [
            {"pp_rank": rank, "group": each.group, "operation": each.operation, "purpose": each.purpose, "calls": each.calls,
             "bytes": each.bytes, "seconds": forecast.seconds(each), "under": each.under}
            for rank, traffic in enumerate(forecast.traffic)
            for each in traffic
        ],
        **of_time(None if isinstance(time, str) else time),
        "training_tokens": training and training.tokens,
        "training_days": training and training.days,
        "training_dollars": training and training.dollars,
        "unknown": [why for why in (forecast.links, time) if isinstance(why, str)],
    }  # fmt: skip


def of_time(time: StepTime | None) -> dict[str, Any]:
    """A step."""
    return {
        "step_seconds": time and time.step_seconds,
        "step_seconds_by_part": time and parts_of(time),
        "tokens_per_second": time and time.tokens_per_second,
        "mfu": time and time.mfu,
        "bubble_fraction": time and time.bubble_fraction,
    }


def of_config(config: Config) -> dict[str, Any]:
    """The layout of a resolved config, and its batch."""
    parallel = config.parallel
    return {**dataclasses.asdict(parallel), "global_batch_size": config.batch_size, "processes": config.processes}
