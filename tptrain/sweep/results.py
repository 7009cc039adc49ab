"""How each job of a sweep went, read from the job folders: also jobs that ran elsewhere or that were killed have one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from tptrain.monitor.metrics import Record, read_metrics
from tptrain.monitor.status import read_status

REFUSED = "refused: "
"""How the error of a job begins whose config was refused."""


@dataclass(frozen=True)
class JobResult:
    """One job. A number is None where it is not known, or not final."""

    number: int
    overrides: dict[str, str]
    status: str
    """done, stopped, running, failed, refused, or waiting: not started."""
    step: int | None = None
    loss: float | None = None
    """At the last step, of a job that is done; nats a token."""
    val_loss: float | None = None
    """At the end, of a job that is done; nats a token."""
    tokens_per_second: float | None = None
    """Median over the logged steps, of a job that is done."""
    error: str = ""
    """One line."""
    folder: Path | None = None


def collect(sweep_dir: Path, planned: Sequence[Sequence[str]] | None) -> list[JobResult]:
    """The jobs in the order of their numbers.

    planned: the overrides of all jobs; of these, what has no folder is waiting, and what an earlier sweep left in the folder is no job of
    this one. None: the jobs are those that have a folder.
    """
    found: dict[int, tuple[list[str], Path]] = {}
    for path in sorted(sweep_dir.rglob(".hydra/hydra.yaml")):
        try:
            number = int(safe_load(path.read_bytes())["hydra"]["job"]["num"])
            overrides = [str(override) for override in safe_load(path.with_name("overrides.yaml").read_bytes())]
        except (OSError, YAMLError, TypeError, KeyError, ValueError):
            continue
        if planned is None or (number < len(planned) and overrides == list(planned[number])):
            found[number] = (overrides, path.parents[1])
    if planned is None:
        return [job_result(number, *found[number]) for number in sorted(found)]
    waiting = [JobResult(number, as_dict(overrides), "waiting") for number, overrides in enumerate(planned)]
    return [job_result(job.number, *found[job.number]) if job.number in found else job for job in waiting]


def job_result(number: int, overrides: Sequence[str], folder: Path) -> JobResult:
    """What the folder of a job tells."""
    said: dict[str, Any] = read_status(folder) or {}
    status, error = str(said.get("state", "waiting")), str(said.get("error") or "")
    if error.startswith(REFUSED):
        status, error = "refused", error.removeprefix(REFUSED)
    records = read_metrics(folder) if status == "done" else []
    return JobResult(
        number,
        as_dict(overrides),
        status,
        said.get("step"),
        _last(records, "loss"),
        _last(records, "val_loss"),
        _median(records, "tokens_per_second"),
        " ".join(error.split()),
        folder,
    )


def exit_code(results: Sequence[JobResult], again: int) -> int:
    """What the command leaves with: 1 where a job has failed, 2 where each was refused, `again` where one has stopped, else 0."""
    states = {job.status for job in results}
    if states == {"refused"}:
        return 2
    if states & {"failed", "refused"}:
        return 1
    return 0 if states <= {"done"} else again if states <= {"done", "stopped", "waiting"} else 1


def swept_keys(results: Sequence[JobResult]) -> list[str]:
    """The overridden keys whose values differ between jobs; all of them where none does.

    >>> swept_keys([JobResult(0, {"seed": "1", "model": "m"}, "done"), JobResult(1, {"seed": "2", "model": "m"}, "done")])
    ['seed']
    """
    keys = list(dict.fromkeys(key for job in results for key in job.overrides))
    differing = [key for key in keys if len({job.overrides.get(key) for job in results}) > 1]
    return differing or keys


def as_dict(overrides: Sequence[str]) -> dict[str, str]:
    """Keys and values.

    >>> as_dict(["+a.b=1,2", "~c"])
    {'a.b': '1,2', '~c': ''}
    """
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def _last(records: Sequence[Record], key: str) -> float | None:
    known = [record[key] for record in records if record.get(key) is not None]
    return known[-1] if known else None


def _median(records: Sequence[Record], key: str) -> float | None:
    known = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(known) if known else None
