"""`metrics.jsonl`: one JSON object a logged step, the truth about a run's numbers.

    {"step": 10, "tokens": 81920, "loss": 4.1, ..., "mfu": null, "peak_memory_bytes": 412000256}
    {"step": 200, "val_loss": 2.3, "val_perplexity": 9.97, "val_loss/wiki": 2.1, "val_loss/code": 2.7}

A number that is not known, or not finite, is null. A run resumed from step s logs the steps after s again, so
the file is first cut back to s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tptrain.files import write_atomically

Record = dict[str, Any]
"""One line of `metrics.jsonl`."""


class MetricsFile:
    """Appends records to `run_dir/metrics.jsonl`, of which it first cuts away every record after `resume_step`.

    evaluation_due: the run begins with the evaluation of that very step, so that an earlier one is cut away too.
    """

    def __init__(self, run_dir: Path, resume_step: int, evaluation_due: bool = False) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = self.path.exists()
        _cut_back(self.path, resume_step, evaluation_due)
        self.earlier = read_metrics(run_dir) if known else None
        """The records that stay, or None where there was no file."""
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (open as long as the run)

    def write(self, record: Record) -> None:
        """Append one record, and flush it."""
        line = json.dumps({key: plain(value) for key, value in record.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_metrics(run_dir: Path) -> list[Record]:
    """All records in the order in which they were written; none where there is no file. Skips a torn last line."""
    try:
        lines = (Path(run_dir) / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [record for record in map(_parse, lines) if record is not None]


def train_record(
    *,
    step: int,
    tokens: int,
    loss: float | None,
    grad_norm: float | None,
    lr: float | None,
    step_time: float | None,
    tokens_per_step: int,
    model_flops_per_token: float | None,
    peak_flops_per_second: float | None,
    processes: int,
    bubble_fraction: float | None,
    data_wait_fraction: float | None,
    peak_memory_bytes: int | None,
    skipped_steps: int,
    time: float | None,
) -> Record:
    """The record of a logged training step.

    tokens: read since the first step of training. step_time: seconds per step, mean over the steps since the last
    record. tokens_per_step: of the global batch, so that tokens_per_second counts the whole job.
    peak_flops_per_second: of one device. bubble_fraction: of the logged step itself, as measured. data_wait_fraction: of the step time,
    waited for what is to be read, over the same steps; like peak_memory_bytes the largest over ranks.
    skipped_steps: since the first step of training, those that were left out. time: of this record, in seconds since the epoch.
    """
    tokens_per_second = tokens_per_step / step_time if step_time else None
    return {
        "step": step,
        "tokens": tokens,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": lr,
        "step_time": step_time,
        "tokens_per_second": tokens_per_second,
        "mfu": mfu(model_flops_per_token, tokens_per_second, peak_flops_per_second, processes),
        "bubble_fraction": bubble_fraction,
        "data_wait_fraction": data_wait_fraction,
        "peak_memory_bytes": peak_memory_bytes,
        "skipped_steps": skipped_steps,
        "time": time,
    }


def eval_record(*, step: int, val_loss: float | None, sets: Mapping[str, float | None] | None = None) -> Record:
    """The record of an evaluation. val_loss: mean nats a token; the perplexity is its exponential.

    sets: the losses of named validation sets by their keys, `val_loss/NAME`.
    """
    try:
        perplexity = None if val_loss is None else math.exp(val_loss)
    except OverflowError:
        perplexity = None
    return {"step": step, "val_loss": val_loss, "val_perplexity": perplexity, **(sets or {})}


def mfu(
    model_flops_per_token: float | None, tokens_per_second: float | None, peak_flops_per_second: float | None, processes: int
) -> float | None:
    """Model FLOPs utilisation (PaLM, appendix B): the FLOPs that the model needs over those the devices could do.

    None where one of the numbers is unknown.

    >>> mfu(6e9, 50_000, 1e15, 2)
    0.15
    """
    if model_flops_per_token is None or tokens_per_second is None or not peak_flops_per_second:
        return None
    return model_flops_per_token * tokens_per_second / (peak_flops_per_second * processes)


def bubble_fraction(busy_seconds: Sequence[float], window_seconds: Sequence[float]) -> float | None:
    """The share of the ranks' time in which they do not compute. None where no rank has measured any.

    busy_seconds: for each rank, in its computations. window_seconds: for each rank, what `windows` gives; the longest stands for the step,
    so that the clocks of several machines need not agree.

    >>> bubble_fraction([3.0, 3.0], [3.0, 4.0])
    0.25
    """
    whole = max(window_seconds) * len(window_seconds)
    return max(0.0, 1 - sum(busy_seconds) / whole) if whole > 0 else None


def windows(starts: Sequence[float], ends: Sequence[float], clocks: Sequence[float]) -> list[float]:
    """For each rank the seconds from the first start to the last end among the ranks that share its clock; 0 where none has computed.

    starts, ends: of each rank's computations, in seconds; inf and -inf without any. clocks: a number that names each rank's clock.
    A rank's own start and end would not do: in zb_v the first rank ends before the last, which starts after it.

    >>> windows([0.0, 1.0, 70.0], [5.0, 6.0, 74.0], [1, 1, 2])
    [6.0, 6.0, 4.0]
    """
    first, last = dict.fromkeys(clocks, math.inf), dict.fromkeys(clocks, -math.inf)
    for start, end, clock in zip(starts, ends, clocks, strict=True):
        first[clock], last[clock] = min(first[clock], start), max(last[clock], end)
    return [max(0.0, last[clock] - first[clock]) for clock in clocks]


def _cut_back(path: Path, last_step: int, evaluation_due: bool) -> None:
    """Leave the readable records up to `last_step`, byte for byte; of that step without the evaluation if it is due."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    kept = b"".join(line + b"\n" for line in data.split(b"\n") if _stays(line, last_step, evaluation_due))
    if kept != data:
        write_atomically(path, kept)


def _stays(line: bytes, last_step: int, evaluation_due: bool) -> bool:
    record = _parse(line)
    if record is None:
        return False
    step = record.get("step")
    is_due = evaluation_due and step == last_step and "val_loss" in record
    return not is_due and not (isinstance(step, int | float) and step > last_step)


def _parse(line: bytes) -> Record | None:
    """The object on a line, or None for a torn or empty one: the start of a JSON object is never itself one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def plain(value: Any) -> Any:
    """A value that JSON can hold: numbers of numpy and torch become Python's, those that are not finite become None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
