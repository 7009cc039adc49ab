"""`hardware=auto` for a plan: this machine, measured by as many ranks as will share it, and remembered for a day.

CACHE/tptrain/this_machine.json     what was measured, by what it depends on: host, torch, ranks, threads, precision
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tptrain import environment, interrupt, launch
from tptrain.config import Config
from tptrain.files import write_atomically
from tptrain.job import Job
from tptrain.probe.record import measured_from
from tptrain.ranks import cores, threads

_DAY_SECONDS = 86_400
_CROWD = 2
"""Ranks on each core, at most, of a plan for this machine."""


def measured(config: Config, ranks: int) -> Config:
    """The config with this machine in its group `hardware`, for a plan of so many ranks on it. What the group names stays; where this
    machine is too small for so many, so does all of it.

    config: typed or resolved, hardware.device=auto. Takes some ten seconds, unless it was done within a day. Raises JobFailed where the
    ranks that measure fail.
    """
    gpus = launch.count_gpus()
    device, each = ("cuda" if gpus else "cpu"), threads(config, ranks)
    if ranks > (gpus or _CROWD * cores()):
        return config
    alone = _tp_alone(config, ranks, device, each)
    key, path = _key(alone), environment.cache_folder() / "this_machine.json"
    known = _read(path)
    found = known.get(key)
    if found is None or not 0 <= time.time() - found["time"] < _DAY_SECONDS:
        found = {"time": time.time(), "measured": _measure(alone)}
        write_atomically(path, json.dumps({**known, key: found}, indent=1).encode())
    return replace(config, hardware=measured_from(found["measured"]).fill(config.hardware, config.train.precision))


def _tp_alone(config: Config, workers: int, device: str, threads_per_rank: int) -> Config:
    """The config under a layout of so many ranks in one tp group, on the device."""
    layout = replace(config.parallel, tp=workers, pp=1, dp=1, sequence_parallel=False, stages_per_rank=1, schedule="1f1b")
    start = replace(config.launch, nodes=1, node_rank=None, master=None, processes_per_node="auto", threads_per_rank=threads_per_rank)
    return replace(config, parallel=layout, hardware=replace(config.hardware, device=device), launch=start)


def _measure(config: Config) -> dict[str, Any]:
    """Have ranks measure."""
    with tempfile.TemporaryDirectory(prefix="tptrain-") as folder, interrupt.signals_stop():
        job = Job("probe", config, Path(folder).absolute(), Path(config.data.store_dir).absolute())
        found: dict[str, Any] = launch.run(job, apart=True)
        return found


def _key(config: Config) -> str:
    """What a measurement depends on."""
    where = f"{socket.gethostname()} {config.hardware.device} torch {version('torch')}"
    return f"{where}, {config.parallel.tp} ranks of {config.launch.threads_per_rank} threads, {config.train.precision}"


def _read(path: Path) -> dict[str, Any]:
    """What is remembered; nothing where there is no file, or none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
