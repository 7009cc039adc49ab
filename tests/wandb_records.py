"""What wandb recorded, read back by its own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def recording(run_dir: Path) -> Path:
    """The one recording of a run folder."""
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return path


def read_back(path: Path) -> list[dict[str, Any]]:
    """All records of a recording."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logged rows, without wandb's own columns."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def files_with(run_dir: Path, text: str) -> list[Path]:
    """Files that hold a text."""
    return [path for path in run_dir.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
