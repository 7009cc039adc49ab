"""torchrun's agent does not stay behind without ranks.

An agent that is cut off from the first node waits for torchrun's store for as long as the system keeps the connection: a quarter of an
hour. Its ranks end in time (launch.timeout_seconds), and then nobody is left to end it. So a rank that has lost others leaves a
process behind, this file, that ends the agent once it has had no ranks for too long, and that leaves when the agent does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
"""Between SIGTERM, which an agent that waits for its store does not hear, and SIGKILL."""


def leave_behind(seconds: float, terminal: int) -> None:
    """Called by a rank: see that its agent ends, at the latest so many seconds after its last rank. Without torchrun or /proc: nothing.

    terminal: a file descriptor, where it is said.
    """
    agent = os.getppid()
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{agent}/cmdline").read_bytes()
        if b"torchrun" in words or b"torch.distributed.run" in words:
            command = [sys.executable, "-I", "-S", __file__, str(agent), _started(agent), str(seconds)]
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=terminal, start_new_session=True)


def watch(agent: int, started: str, seconds: float) -> None:
    """Return once the agent has ended or has ranks anew; else end it after so many seconds without any. started: as `_started` gave it."""
    last, alone = time.monotonic(), False
    while _is_there(agent, started):
        if _has_ranks(agent):
            if alone:
                return
            last = time.monotonic()
        else:
            alone = True
        if time.monotonic() - last > seconds:
            _end(agent, started)
            return
        time.sleep(_POLL_SECONDS)


def _end(agent: int, started: str) -> None:
    sys.stderr.write(f"tptrain: torchrun has had no ranks on this node and no word from node 0 for too long: ending it (process {agent})\n")
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent, number)
        end = time.monotonic() + _GRACE_SECONDS
        while _is_there(agent, started) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)


def _started(process: int) -> str:
    """When a process was started, which with its id is no other's: proc(5), `stat`, field 22."""
    return _fields(process)[19]


def _is_there(process: int, started: str) -> bool:
    with contextlib.suppress(OSError):
        return _started(process) == started and _fields(process)[0] != "Z"
    return False


def _has_ranks(agent: int) -> bool:
    """Whether the agent has a child that runs, this process not counted: it may fall to an agent that is the first of a container."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                fields = _fields(int(entry))
                if int(fields[1]) == agent and fields[0] != "Z":
                    return True
    return False


def _fields(process: int) -> list[str]:
    """`stat` from its third field on: state, parent, ...; the name before them may hold anything."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
