"""What a rank does once it has failed and before it leaves: it writes its record, and where it lost another rank, it stays a moment.

    own error          record, leave at once: whoever started the ranks ends the others, and shows this
    lost another rank  record, the last communications, the roll call (`roll_call.py`), the names of who is missing

Each step leaves more on disk than the one before, so that a rank that is killed meanwhile has said what it knew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from tptrain import failures, roll_call
from tptrain.failures import Failure


def say(run_dir: Path, rank: int, error: Exception) -> tuple[Failure, Sequence[int]]:
    """Record that `rank` fell by `error`. Returns the record and the ranks that have not fallen, as far as that was waited for."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    failure = failures.record(run_dir, rank, error)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return failure, ()
    store = _get_default_store()
    roll_call.fall(store, rank)
    if failure.kind != "lost_peer":
        return failure, ()
    _keep_communications(run_dir, rank)
    timed_out = failures.timed_out(error)
    patience_seconds = roll_call.PATIENCE_SECONDS * (1 if timed_out else 2)
    silent = roll_call.missing(store, dist.get_world_size(), patience_seconds, failure.waited_for)
    if timed_out and silent and not failure.waited_for:
        failure = failures.name(run_dir, failure, silent)
    return failure, silent


def _keep_communications(run_dir: Path, rank: int) -> None:
    """Write what torch's flight recorder knows of this rank's last communications over gloo, as JSON: `logs/flight-gloo-N.json`.

    NCCL's own time limit ends the process, and leaves a file of its own (`environment.py`).
    """
    import torch._C._distributed_c10d as c10d

    with contextlib.suppress(Exception):  # no public part of torch
        (run_dir / "logs" / f"{failures.FLIGHT}gloo-{rank}.json").write_bytes(c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
