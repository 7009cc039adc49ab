"""Names and life-cycle of checkpoint folders. Knows no torch.

checkpoints/step-00000100/           complete: it got this name by a rename, after all of it was on disk
checkpoints/step-00000200.partial/   being written, or left by a run that was killed
checkpoints/latest                   the name of the newest complete one
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tptrain.config import Config, refuse
from tptrain.files import sync_folder, write_atomically

_COMPLETE = re.compile(r"step-(\d{8})")
STATE_FILE = "state.json"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the complete checkpoint of a step stands."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(final.name + ".partial")


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)) if folder.is_dir() else []


def find_start(config: Config, run_dir: Path) -> Path | None:
    """The checkpoint that a run starts from by `checkpoint.resume`, or None. Raises ConfigError if there is none there."""
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        complete = complete_checkpoints(run_dir)
        return complete[-1] if complete else None
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise refuse("checkpoint.resume", resume, "is no checkpoint folder", "use auto, never or the path of a checkpoints/step-* folder")
    return path


def publish(partial: Path, state: dict[str, Any]) -> Path:
    """Make a fully written partial folder the newest complete checkpoint. Returns its final path."""
    final = partial.with_name(partial.name.removesuffix(".partial"))
    write_atomically(partial / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)
    write_atomically(final.parent / "latest", f"{final.name}\n".encode())
    return final


def read_state(folder: Path) -> dict[str, Any]:
    """What `publish` was given."""
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    return state


def rotate(run_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and what killed runs left."""
    for path in complete_checkpoints(run_dir)[:-keep]:
        doomed = path.with_name(path.name + ".deleted")
        path.rename(doomed)  # first, so that no half-deleted folder bears a complete one's name
        shutil.rmtree(doomed)
    for leftover in (run_dir / "checkpoints").glob("step-*.*"):
        shutil.rmtree(leftover, ignore_errors=True)
