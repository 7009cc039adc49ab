"""Names and life-cycle of checkpoint folders. Knows no torch.

checkpoints/step-00000100/           complete: it got this name by a rename, after all of it was on disk
checkpoints/step-00000200.partial/   being written, or left by a run that was killed
checkpoints/step-00000150.damaged/   was complete, and is not what was written any more: a run went on from an older one
checkpoints/latest                   the name of the newest complete one
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tptrain.checkpoint.manifest import DamagedCheckpoint, read_json, write_manifest
from tptrain.config import CheckpointConfig
from tptrain.files import sync_folder, write_atomically

_COMPLETE = re.compile(r"step-(\d{8,})")
STATE_FILE = "state.json"
LATEST = "latest"


def home_of(config: CheckpointConfig, run_dir: Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(config.dir) if config.dir is not None else run_dir / "checkpoints"


def checkpoint_folder(home: Path, step: int) -> Path:
    """Where the complete checkpoint of a step stands."""
    return home / f"step-{step:08d}"


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(final.name + ".partial")


def complete_checkpoints(home: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in home.iterdir() if _COMPLETE.fullmatch(path.name)), key=step_of) if home.is_dir() else []


def step_of(complete: Path) -> int:
    """The step that a complete checkpoint was made after, by its name."""
    found = _COMPLETE.fullmatch(complete.name)
    assert found is not None, f"{complete} is no checkpoint's name"
    return int(found[1])


def make_room(partial: Path) -> None:
    """Make an empty folder to write a checkpoint into. Nothing else may be being written: what runs that were killed left is deleted."""
    clear(partial.parent)
    partial.mkdir(parents=True)
    sync_folder(partial.parent)


def publish(partial: Path, state: dict[str, Any]) -> Path:
    """Make a fully written partial folder the newest complete checkpoint. Returns its final path.

    The manifest is written last, then the folder gets its name, and `latest` follows.
    """
    final = partial.with_name(partial.name.removesuffix(".partial"))
    write_atomically(partial / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())
    write_manifest(partial)
    if final.exists():
        _doom(final)
    partial.rename(final)
    sync_folder(final.parent)
    write_atomically(final.parent / LATEST, f"{final.name}\n".encode())
    return final


def read_state(folder: Path) -> dict[str, Any]:
    """What `publish` was given. Raises DamagedCheckpoint where the file holds something else."""
    state = read_json(folder / STATE_FILE)
    if not isinstance(state, dict):
        raise DamagedCheckpoint(folder / STATE_FILE, "is no training state")
    return state


def rotate(home: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the `keep` newest complete checkpoints and those of every `keep_every`th step, and what killed runs left."""
    for path in complete_checkpoints(home)[:-keep]:
        if keep_every is None or step_of(path) % keep_every:
            _doom(path)
    clear(home)


def clear(home: Path) -> None:
    """Delete what is given up or was left by runs that were killed. To be called while nothing is written."""
    for ending in ("partial", "deleted"):
        for leftover in home.glob(f"step-*.{ending}"):
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(damaged: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts no more. It stays until somebody deletes it. Returns its new path."""
    aside = damaged.with_name(damaged.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    damaged.rename(aside)
    sync_folder(aside.parent)
    return aside


def _doom(complete: Path) -> None:
    """Mark a complete checkpoint as one to be deleted: renamed first, so that no half-deleted folder bears a complete one's name."""
    doomed = complete.with_name(complete.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    complete.rename(doomed)
