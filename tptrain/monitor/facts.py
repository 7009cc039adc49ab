"""What code a run ran: versions of what it rests on, and the commit of its source."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("tptrain", "torch", "numpy", "tokenizers", "datasets", "wandb")
_SOURCE = Path(__file__).resolve().parents[2]


def about_code() -> dict[str, Any]:
    """`versions`, by package, Python's among them, and `git_commit`."""
    return {"versions": versions(), "git_commit": git_commit(_SOURCE)}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit(checkout: Path) -> str | None:
    """The commit of a checkout, with `-dirty` where files differ from it; None where the folder is none, as in an installed package."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
