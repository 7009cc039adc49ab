"""Runs the command `python -m tptrain` for a test, with or without the stand-in for training in `tests/faults`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FAULTS = Path(__file__).parent / "faults"
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, and with these; PYTHONPATH's own folders come first."""
    kept = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    paths = [path for path in (variables.get("PYTHONPATH"), kept.get("PYTHONPATH")) if path]
    return {**kept, **variables, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def start(folder: Path, *arguments: str, torchrun: int = 0, **variables: str) -> subprocess.Popen[str]:
    """Start the command in `folder`, under torchrun with that many ranks if asked."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tptrain", *arguments],
        cwd=folder, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 400) -> Outcome:
    """Wait for the command's end."""
    begin = time.monotonic()
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err, time.monotonic() - begin)


def command(folder: Path, *arguments: str, torchrun: int = 0, **variables: str) -> Outcome:
    """Run the command in `folder` to its end."""
    return finish(start(folder, *arguments, torchrun=torchrun, **variables))


def processes_of(folder: Path) -> list[str]:
    """Command lines of live processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def wait_until(condition, seconds: float = 120) -> None:
    """Poll until `condition()` holds. Raises AssertionError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
