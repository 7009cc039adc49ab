"""Why a job failed: what each rank writes down when it falls, and how the one true cause is picked from it.

When one rank fails, all others fail too, a moment later, with errors of the connection that they lost:

    rank 2   RuntimeError: CUDA out of memory            <- the cause
    rank 0   Connection closed by peer [127.0.0.1]:4711  <- a follower
    rank 1   killed by SIGTERM                           <- stopped by the launcher

A rank that is frozen writes nothing, and is killed in the end because it does not stop; then the cause is that another waited for it
in vain.

So each rank leaves `logs/rank-N.error.json` before it tears anything down (`last_words.py`), and whoever started the ranks reads
these files and the exit codes, and shows the cause alone. Followers' tracebacks stay in `logs/rank-N.log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tptrain.config import ConfigError

_LOST_PEER_TEXT = re.compile(
    r"Connection (closed|reset|refused|aborted)|Broken pipe|Socket (Timeout|closed)|[Tt]imed? ?out|wait timeout"
    r"|connectFullMesh|failed to recv|remote process (has )?exited|Connection was likely closed"
)
_TIMED_OUT_TEXT = re.compile(r"[Tt]imed? ?out|wait timeout")
_LOST_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")

FLIGHT = "flight-"
"""How the files in `logs/` begin that hold a rank's last communications."""


@dataclass(frozen=True)
class Failure:
    """How one rank ended."""

    rank: int
    time: float
    """Seconds since the epoch."""
    kind: str
    """error: its own; refused: a ConfigError; diverged: losses or gradients that are no numbers; lost_peer: it lost another rank;
    killed: by a signal; exit: left without a word."""
    error: str
    """One line."""
    traceback: str = ""
    signal: int = 0
    waited_for: Sequence[int] = ()
    """The ranks that did not answer in time, as far as they are known."""


@dataclass
class Outcome:
    """How ranks ended, as their launcher saw it."""

    exits: dict[int, tuple[int, float]] = field(default_factory=dict)
    """For each rank that did not leave with 0: its exit code (negative: minus the signal), and when that was seen (seconds, epoch)."""
    asked: str | None = None
    """The signal that the launcher handed on to its ranks."""


class JobFailed(RuntimeError):
    """The job failed, and the terminal has been told why. The message is the cause in one line. kind: as of `Failure`."""

    def __init__(self, message: str, kind: str = "error") -> None:
        super().__init__(message)
        self.kind = kind


def log_path(run_dir: Path, rank: int) -> Path:
    """The file that holds what a rank said."""
    return run_dir / "logs" / f"rank-{rank}.log"


def one_line(error: BaseException) -> str:
    """`ValueError: what it says`, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def kind_of(error: BaseException) -> str:
    """`refused`, `diverged`, `lost_peer` where the error or one that it grew from is of the connection to another rank, else `error`."""
    if isinstance(error, ConfigError):
        return "refused"
    if isinstance(error, FloatingPointError):
        return "diverged"
    for link in _chain(error):
        is_runtime = isinstance(link, (RuntimeError, OSError))
        if type(link).__name__ in _LOST_PEER_TYPES or (is_runtime and _LOST_PEER_TEXT.search(str(link))):
            return "lost_peer"
    return "error"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, the one that it grew from, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def record(run_dir: Path, rank: int, error: BaseException) -> Failure:
    """Write down that `rank` fell by `error`: the traceback into its log, all of it into `logs/rank-N.error.json`."""
    message = str(error) if isinstance(error, ConfigError) else one_line(error)
    text = "".join(traceback.format_exception(error))
    peer = named_peer(error)
    failure = Failure(rank, time.time(), kind_of(error), message, text, waited_for=() if peer is None else (peer,))
    path = _record_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, failure, text)
    return failure


def name(run_dir: Path, failure: Failure, waited_for: Sequence[int]) -> Failure:
    """Add to a record the ranks that did not answer in time."""
    silent = f"rank{'s' * (len(waited_for) > 1)} {', '.join(map(str, waited_for))} did not answer in time"
    text = f"{silent}\n"
    named = replace(failure, error=f"{failure.error} ({silent})", traceback=failure.traceback + text, waited_for=tuple(waited_for))
    _write(_record_path(run_dir, failure.rank), named, text)
    return named


def timed_out(error: BaseException) -> bool:
    """Whether a time limit of the connection to other ranks ended it."""
    return kind_of(error) == "lost_peer" and any(_TIMED_OUT_TEXT.search(str(link)) for link in _chain(error))


def named_peer(error: BaseException) -> int | None:
    """The one rank that did not answer in time, where the error or one that it grew from says so."""
    links = (link for link in _chain(error) if getattr(link, "waited_for", None) is not None)
    return next((link.waited_for for link in links if _TIMED_OUT_TEXT.search(str(link))), None)  # type: ignore[attr-defined]


def forget(run_dir: Path) -> None:
    """Remove what an earlier start in the same run folder left."""
    for pattern in ("rank-*.error.json", f"{FLIGHT}*"):
        for path in (run_dir / "logs").glob(pattern):
            path.unlink(missing_ok=True)


def root_cause(run_dir: Path, exits: dict[int, tuple[int, float]]) -> Failure:
    """The failure that the others followed from.

    exits: for each rank that did not leave with 0, its exit code (negative: minus the signal) and when it was seen.
    """
    records = {rank: _read(_record_path(run_dir, rank)) for rank in exits}
    return _most_suspicious([records[rank] or _from_exit(rank, code, seen) for rank, (code, seen) in exits.items()])


def recorded_cause(run_dir: Path) -> Failure | None:
    """What the ranks' records alone show: the first error of a rank's own, else who waited for whom in vain, else None."""
    found = [_read(path) for path in (run_dir / "logs").glob("rank-*.error.json")]
    records = [failure for failure in found if failure and (failure.kind != "lost_peer" or failure.waited_for)]
    return _most_suspicious(records) if records else None


def _most_suspicious(failures: Sequence[Failure]) -> Failure:
    waiting = [failure for failure in failures if failure.waited_for]
    silent = {rank for failure in waiting for rank in failure.waited_for} - {failure.rank for failure in waiting}
    return min(failures, key=lambda failure: (_suspicion(failure, silent), failure.time))


def describe(failure: Failure, run_dir: Path) -> str:
    """What the terminal says about it: the traceback where there is one, and where to read more."""
    log = log_path(run_dir, failure.rank)
    with contextlib.suppress(ValueError):
        log = log.relative_to(Path.cwd())
    if not failure.traceback:
        return f"rank {failure.rank} {failure.error}\nits log: {log}"
    return f"rank {failure.rank} failed:\n{failure.traceback}".rstrip() + f"\nits log: {log}"


def say(text: str) -> None:
    """One message on the terminal, whole."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def _suspicion(failure: Failure, silent: set[int]) -> int:
    """0 for what happens to a rank by itself, more for what may be a consequence. silent: ranks that did not answer in time, and
    waited for nobody themselves."""
    if failure.signal == signal.SIGTERM or (failure.signal == signal.SIGKILL and failure.rank in silent):
        return 4  # how a launcher stops the others
    if failure.kind == "lost_peer":
        return 2 if failure.waited_for and silent.issuperset(failure.waited_for) else 3
    if failure.signal == signal.SIGABRT or failure.kind == "exit":
        return 1  # gloo aborts a process whose connection broke at a bad moment
    return 0


def _from_exit(rank: int, code: int, seen: float) -> Failure:
    if code >= 0:
        return Failure(rank, seen, "exit", f"left with exit code {code} and no word")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (out of memory? the kernel kills the largest process: see dmesg)" if -code == signal.SIGKILL else ""
    return Failure(rank, seen, "killed", f"was killed by {name}{hint}", signal=-code)


def _write(path: Path, failure: Failure, text: str) -> None:
    """The record, and `text` at the end of the rank's log."""
    # Renamed into place: the reader never sees half a file, even if this rank is killed meanwhile.
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(failure), indent=1))
    draft.replace(path)
    with log_path(path.parents[1], failure.rank).open("a") as log:
        log.write(text)


def _read(path: Path) -> Failure | None:
    try:
        return Failure(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _record_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.error.json"


def show_cursor() -> None:
    """Give the terminal its cursor back, in case a rank died while it drew a live display."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
