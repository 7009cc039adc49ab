"""Ranks of our own on this machine: torch elastic starts them, and what their ends mean is read from their records and exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tptrain import failures, ranks
from tptrain.config import ConfigError
from tptrain.failures import Failure, JobFailed, Outcome
from tptrain.job import Job, Meeting
from tptrain.stop import Stopped

_SHUTDOWN_SECONDS = 10
"""How long ranks may take to end after a signal before they are killed."""


def own_ranks(config: Any) -> range:
    """The ranks that this command starts: launch.nodes share them evenly. config: resolved, with `launch` and `processes`."""
    here = config.processes // config.launch.nodes
    first = here * (config.launch.node_rank or 0)
    return range(first, first + here)


def run_ranks(job: Job, meeting: Meeting | None = None) -> Outcome:
    """Start this machine's ranks and wait for them. meeting: where they find those of other nodes."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    own = own_ranks(job.config)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(own),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=_SHUTDOWN_SECONDS,
        signals_to_handle="SIGQUIT",  # the others are ours: see signals_stop
    )
    command = ["-u", "-m", "tptrain.launch", job.work, str(job.run_dir), str(job.store_dir), str(os.getpid())]
    if meeting is not None:
        command.append(json.dumps(asdict(meeting)))
    outcome = Outcome()
    try:
        with _quiet_elastic():
            elastic_launch(settings, sys.executable)(*command)
    except ChildFailedError as error:
        outcome.exits = {own[rank]: (failure.exitcode, float(failure.timestamp)) for rank, failure in error.failures.items()}
    finally:
        failures.show_cursor()
    outcome.asked = job.wish.reason
    return outcome


def judge(job: Job, outcome: Outcome) -> dict[str, Any]:
    """What the ranks' ends mean: {"value": rank 0's}, {"stopped": why} or {"failure": the root cause, "asked": the signal, if any}."""
    if not outcome.exits:
        result: dict[str, Any] = json.loads(ranks.result_path(job.run_dir).read_text())
        return result
    cause = failures.root_cause(job.run_dir, outcome.exits)
    if outcome.asked is not None and cause.kind in ("killed", "lost_peer"):  # some had left the training, or not yet begun it
        return {"stopped": f"stopped by {outcome.asked}"}
    return {"failure": asdict(cause), "asked": outcome.asked}


def act_on(job: Job, end: dict[str, Any]) -> Any:
    """The value of an end that has one; else raise what it means."""
    if "stopped" in end:
        raise Stopped(end["stopped"])
    if "failure" in end:
        raise _tell(job.run_dir, Failure(**end["failure"]))
    return end["value"]


def _tell(run_dir: Path, cause: Failure) -> Exception:
    """Show the root cause; the exception to raise for it."""
    if cause.kind == "refused":
        return ConfigError(cause.error)
    failures.say(failures.describe(cause, run_dir))
    between = " " if cause.kind in ("killed", "exit") else ": "
    return JobFailed(f"rank {cause.rank}{between}{cause.error}", cause.kind)


@contextlib.contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Keep torch elastic from logging to the terminal, and from asking a name server who we are for its event log."""
    logger = logging.getLogger("torch.distributed.elastic")
    silence, propagate, full_name = logging.NullHandler(), logger.propagate, socket.getfqdn
    logger.addHandler(silence)
    logger.propagate = False
    socket.getfqdn = lambda name="": name or socket.gethostname()
    try:
        yield
    finally:
        socket.getfqdn = full_name
        logger.propagate = propagate
        logger.removeHandler(silence)
