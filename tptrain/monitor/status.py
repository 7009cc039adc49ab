"""`status.json`: how a run stands, for people and schedulers.

    {"state": "running", "step": 120, "error": null}

State is running, done, stopped (saved, run me again) or failed (error says why, in one line).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tptrain.files import write_atomically

STATES = ("running", "done", "stopped", "failed")
"""What a run can be."""


def write_status(run_dir: Path, state: str, step: int | None = None, error: str | None = None) -> None:
    """Write `run_dir/status.json` atomically.

    step: the last step that is done; None keeps the step of the file that is there.
    Raises ValueError for an unknown state.
    """
    if state not in STATES:
        raise ValueError(f"state={state} is unknown: use one of {', '.join(STATES)}")
    if step is None:
        step = (read_status(run_dir) or {}).get("step")
    status = {"state": state, "step": None if step is None else int(step), "error": error}
    write_atomically(Path(run_dir) / "status.json", (json.dumps(status) + "\n").encode())


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `status.json` says, or None where there is none that can be read."""
    try:
        status = json.loads((Path(run_dir) / "status.json").read_bytes())
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None
