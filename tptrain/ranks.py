"""What one rank does around its work: log, threads, process group, the work, leave.

    started by us     python -m tptrain.launch WORK RUN_DIR STORE_DIR PARENT     `spawned`
    by a launcher     torchrun -m tptrain ..., srun tptrain ...                  `joined`
    the only one      inside the command's own process                           `inline`

In all three, the work (a name in `WORKS`: train, ...) finds a default process group, this rank's log in `logs/rank-N.log`,
and the number of threads it may compute with. Nothing here reads the environment: `environment.py` does, and passes a `Place`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tptrain import failures, last_words, lifeline, roll_call
from tptrain.config import Config, ConfigError
from tptrain.eval_config import EvalConfig
from tptrain.generate_config import GenerateConfig
from tptrain.host_memory import keep_freed_memory
from tptrain.job import ALONE, Job, Meeting, Place
from tptrain.stop import ON_BEHALF, Stopped, Wish, follow_launcher
from tptrain.stop import numbers as stop_signals

_LONG = timedelta(days=30)
"""More than any preparation takes. Whoever waits so long is released earlier, with an error, where rank 0 dies."""

_START_SECONDS = 300.0
"""How long ranks may take to start after one another, where launch.timeout_seconds is shorter."""

# ---- what ranks can do -----------------------------------------------------------------------------------


def _train(job: Job) -> float | None:
    """The training itself."""
    from tptrain.train import train

    return train(job.config, job.run_dir, job.store_dir, job.wish)


def _check_twin(job: Job) -> dict[str, Any]:
    """The one process that a layout is compared with."""
    from tptrain.check import run_twin

    return run_twin(job.config, job.run_dir, job.store_dir)


def _check_layout(job: Job) -> dict[str, Any]:
    """A layout, compared with the one process that ran before."""
    from tptrain.check import run_layout

    return run_layout(job.config, job.run_dir, job.store_dir)


def _generate(job: Job) -> dict[str, float]:
    """Text by a trained model."""
    from tptrain.generate import generate

    return generate(job.config)


def _evaluate(job: Job) -> dict[str, Any]:
    """Losses and likelihoods of a trained model."""
    from tptrain.evaluate import evaluate

    return evaluate(job.config, job.run_dir, job.store_dir)


def _doctor(job: Job) -> dict[str, Any] | None:
    """What there is to say about the machines of the ranks."""
    from tptrain.doctor.examine import examine

    return examine(job.config, job.run_dir, job.store_dir)


def _probe(job: Job) -> dict[str, Any] | None:
    """What this machine can do."""
    from tptrain.probe.measure import measure

    return measure(job.config)


def _same_versions(store: Any, place: Place, timeout_seconds: float) -> None:
    """Whether the ranks can be compared at all."""
    from tptrain.doctor.versions import agree

    agree(store, place.rank, place.world_size, timeout_seconds)


@dataclass(frozen=True)
class Work:
    """One thing that ranks can do."""

    run: Callable[[Job], Any]
    """Every rank calls it; rank 0's value, which JSON can hold, goes back to the launcher."""
    config: type = Config
    """The schema of the job's `config.yaml`. It has the groups `hardware` and `launch`, and `processes`."""
    shares: bool = False
    """Whether the ranks of several machines need one run folder, and each machine the same tokens."""
    before: Callable[[Any, Place, float], None] | None = None
    """Called on each of several ranks before there is a process group, with the store in which they found each other and the seconds for
    which they wait for each other. What it refuses, it refuses on every rank."""


WORKS = {
    "train": Work(_train, shares=True),
    "check-twin": Work(_check_twin),
    "check-layout": Work(_check_layout),
    "doctor": Work(_doctor, before=_same_versions),
    "probe": Work(_probe),
    "generate": Work(_generate, GenerateConfig),
    "eval": Work(_evaluate, EvalConfig),
}
"""By the name that travels to the ranks."""


# ---- the three ways in -----------------------------------------------------------------------------------


def inline(job: Job) -> Any:
    """Work in this very process: a group of one in memory, no network, and a debugger works. Returns the work's value."""
    with _log(job.run_dir, 0):
        _join_group(job.work, job.config, ALONE)
        try:
            return WORKS[job.work].run(job)
        except Exception as error:
            failures.record(job.run_dir, 0, error)
            raise
        finally:
            _leave_group()


def joined(
    work: str,
    config: Config,
    prepare: Callable[[], Job],
    place: Place,
    wish: Wish,
    begin: Callable[[Path], None],
    bereaved: Callable[[int], None],
) -> Any:
    """Work as one of a launcher's ranks. prepare: makes the job; rank 0 calls it, and the others take the job from rank 0. wish: tells this
    rank to stop. begin: called with the run folder before the work. bereaved: called where other ranks did not
    answer, with a file descriptor of the terminal.

    Raises JobFailed once this rank's failure is recorded and told, Stopped once all ranks have stopped, and what `prepare` raises.
    """
    terminal = os.dup(sys.stderr.fileno())
    run_dir: Path | None = None
    try:
        job, store_dir, store = _meet(work, config, prepare, place)
        run_dir = job.run_dir if job else None
        _join_group(work, config, place, store)
        job = dataclasses.replace(_from_rank_0(job), wish=wish)
        job = dataclasses.replace(job, store_dir=store_dir or job.store_dir)
        run_dir = job.run_dir
        _keep_log(run_dir, place.rank)
        begin(run_dir)
        value = WORKS[job.work].run(job)
        _wait_for_all()  # none succeeds alone
        return value
    except Stopped:
        if wish.listening:
            with contextlib.suppress(RuntimeError):  # torchrun ends the others as soon as one has left with an exit code that is not 0
                _wait_for_all()
        raise
    except Exception as error:
        if failures.kind_of(error) == "lost_peer":
            bereaved(terminal)
        if run_dir is None or (isinstance(error, ConfigError) and not _has_group()):  # every rank refuses, and the first says so
            raise
        raise failures.JobFailed(_tell(run_dir, place, error, terminal)) from error


def spawned(work: str, run_dir: Path, store_dir: Path, place: Place, meeting: Meeting | None = None) -> NoReturn:
    """Work as a rank that `launch.py` started, and leave the process. The launcher says what went wrong, not we.

    meeting: where the ranks of other nodes are, if there are any.
    """
    wish = Wish(announce=partial(_write_pid, run_dir, place.rank))
    follow_launcher(wish, os.getppid())
    _keep_log(run_dir, place.rank)
    try:
        job = dataclasses.replace(Job.load(work, run_dir, store_dir, WORKS[work].config), wish=wish)
        _join_group(work, job.config, place, _store_at(meeting) if meeting else None)
        value = WORKS[work].run(job)
        if place.rank == 0:
            result_path(run_dir).write_text(json.dumps({"value": value}))
    except Stopped as stop:
        if place.rank == 0:
            result_path(run_dir).write_text(json.dumps({"stopped": str(stop)}))
    except Exception as error:
        last_words.say(run_dir, place.rank, error)
        leave(1)
    leave(0)


def result_path(run_dir: Path) -> Path:
    """Where rank 0 leaves its work's value for the launcher."""
    return run_dir / "logs" / "rank-0.result.json"


def pass_on(run_dir: Path, own: Iterable[int], number: signal.Signals) -> bool:
    """In the launcher: hand a signal to its own ranks. False where one of them does not listen, as before the training's first step."""
    try:
        pids = [int(_pid_path(run_dir, rank).read_text()) for rank in own]
        for pid in pids:
            os.kill(pid, ON_BEHALF.get(number, number))
    except (OSError, ValueError):
        return False
    return True


def forget(run_dir: Path, processes: int) -> None:
    """Remove what ranks that were started earlier left for the launcher."""
    failures.forget(run_dir)
    for path in [result_path(run_dir), *(_pid_path(run_dir, rank) for rank in range(processes))]:
        path.unlink(missing_ok=True)


# ---- the parts -------------------------------------------------------------------------------------------


def die_with_parent(started_by: int | None = None) -> None:
    """Have the kernel kill this rank when its parent dies (Linux), and let signals end it at once.

    A rank blocked inside a collective runs no Python, so no Python handler could end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lifeline.die_with_parent(started_by)


def _pid_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.pid"


def _write_pid(run_dir: Path, rank: int) -> None:
    """Let the launcher know that this rank listens."""
    draft = _pid_path(run_dir, rank).with_suffix(".pid.tmp")
    draft.write_text(str(os.getpid()))
    draft.replace(_pid_path(run_dir, rank))


def _tell(run_dir: Path, place: Place, error: Exception, terminal: int) -> str:
    """Of torchrun's ranks, which no launcher of ours speaks for: record why this one fell, and tell the terminal and the run's status.

    A rank with an error of its own speaks for itself. Of those that lost another one, the first on a machine that has fallen
    speaks for all there.
    Returns the cause in one line.
    """
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)  # torchrun may end us from here on
    follows = failures.kind_of(error) == "lost_peer"
    if follows and place.rank == 0:  # at once, while we may
        _write_failed(run_dir, place.rank)
    failure, silent = last_words.say(run_dir, place.rank, error)
    if not follows:
        os.write(terminal, f"{failures.describe(failure, run_dir)}\n".encode())
        time.sleep(0.5)  # until rank 0 waits for us, else its "running" may come after our "failed", and torchrun then stops it
        _write_failed(run_dir, place.rank)
    elif place.rank == min({*place.neighbours} - {*silent}, default=None):
        cause = _write_failed(run_dir, place.rank)
        if cause is None:
            log = failures.log_path(run_dir, place.rank)
            who = f" (no word from rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))})" * bool(silent and place.nodes > 1)
            os.write(terminal, f"tptrain: rank {place.rank} lost another rank{who}; its log: {log}\n".encode())
        elif cause.kind == "lost_peer":
            os.write(terminal, f"{failures.describe(cause, run_dir)}\n".encode())
    return failure.error


def _write_failed(run_dir: Path, rank: int) -> failures.Failure | None:
    """Set the run's status to the cause that the ranks have recorded by now, and return it; without one `rank` lost another."""
    cause = failures.recorded_cause(run_dir)
    write_status(run_dir, "failed", f"rank {cause.rank}: {cause.error}" if cause else f"rank {rank} lost another rank")
    return cause


def _wait_for_all() -> None:
    """Return once all ranks are here. Raises RuntimeError where one of them is gone."""
    import torch
    import torch.distributed as dist

    for rank in range(dist.get_world_size()):
        dist.broadcast_object_list([None], src=rank, device=torch.device("cpu"))


def write_status(run_dir: Path, state: str, error: str | None = None) -> None:
    """Set the run's state and error; the last known step stays."""
    from tptrain.monitor.status import write_status as write

    write(run_dir, state, step=None, error=error)


def leave(code: int) -> NoReturn:
    """End this process at once: flush, leave the process group, and skip the interpreter's own end.

    At the interpreter's end a gloo thread may still drop a work object while Python finalises, which aborts the
    process (about 1 run in 7). After a failure the group is not left in good order either: NCCL would wait.
    """
    if code == 0:
        with contextlib.suppress(Exception):
            _leave_group()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _meet(work: str, config: Config, prepare: Callable[[], Job], place: Place) -> tuple[Job | None, Path | None, Any]:
    """Rank 0's job, once it is prepared, on rank 0 alone; the token store of this node, where it may be another than rank 0's; and the
    store over which torchrun's ranks find each other.

    To tokenise may take hours, so the other ranks wait here as long as rank 0 lives; only then does launch.timeout_seconds count.
    """
    import torch.distributed as dist

    timeout, key = timedelta(seconds=config.launch.timeout_seconds), "tptrain/prepared"
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    job, store_dir = None, None
    if place.nodes > 1 and WORKS[work].shares:
        job, store_dir = _meet_nodes(config, prepare, place, dist.PrefixStore("tptrain/nodes", store))
    else:
        if place.rank == 0:
            job = prepare()
            store.set(key, "")
        store.wait([key], _LONG)
    return job, store_dir, store


def _meet_nodes(config: Config, prepare: Callable[[], Job], place: Place, store: Any) -> tuple[Job | None, Path]:
    """The same over several nodes: rank 0's job, and this node's token store. The first rank of each node speaks for it."""
    from tptrain.council import Council, LostNode
    from tptrain.nodes import prepare_together

    jobs: list[Job] = []

    def prepare_first() -> Job:
        jobs.append(prepare())
        return jobs[0]

    seconds, listener = config.launch.timeout_seconds, place.local_rank > 0
    try:
        with Council(store.clone, place.node, place.nodes, seconds, listener) as council:
            _, store_dir = prepare_together(council, config, prepare_first)
    except LostNode as lost:
        if not listener:
            failures.say(f"tptrain: {lost}")
        raise failures.JobFailed(str(lost)) from lost
    return (jobs[0] if jobs else None), store_dir


def _store_at(meeting: Meeting) -> Any:
    """The store in which the ranks of all nodes find each other."""
    from torch.distributed import TCPStore

    limit = timedelta(seconds=_START_SECONDS)
    return roll_call.store_of_attempt(TCPStore(meeting.host, meeting.port, None, False, timeout=limit), meeting.attempt)


def _join_group(work: str, config: Config, place: Place, store: Any = None) -> None:
    """Make the default process group: gloo, and NCCL too on GPUs. One rank alone needs no network. store: where torchrun's ranks met."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads(config, place.local_world_size))
    keep_freed_memory()
    on_gpu = config.hardware.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(0 if place.own_gpu else place.local_rank)
    timeout = timedelta(seconds=config.launch.timeout_seconds)
    if place == ALONE:
        store = dist.HashStore()
    else:  # ranks start up to minutes after one another, where their libraries come over a slow network
        slowest = max(config.launch.timeout_seconds, _START_SECONDS)
        if store is None:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=slowest)))
        roll_call.arrive(store, place.rank, place.world_size, slowest)
        store.set_timeout(timeout)
        if (before := WORKS[work].before) is not None:
            before(dist.PrefixStore("tptrain/before", store), place, config.launch.timeout_seconds)
        store = dist.PrefixStore("tptrain/group", store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=place.rank, world_size=place.world_size)


def threads(config: Config, local_ranks: int) -> int:
    """CPU threads for this rank: the number asked for, or this machine's cores shared by its ranks."""
    asked = config.launch.threads_per_rank
    return max(1, cores() // local_ranks) if asked == "auto" else int(asked)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


def _leave_group() -> None:
    if _has_group():
        sys.modules["torch.distributed"].destroy_process_group()


def _from_rank_0(job: Job | None) -> Job:
    """Rank 0's job, on every rank."""
    import torch
    import torch.distributed as dist

    box = [job]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    assert box[0] is not None
    return box[0]


def _keep_log(run_dir: Path, rank: int) -> None:
    """Send what this rank says to `logs/rank-N.log`, for good. Rank 0 keeps the terminal too, for its live display."""
    _open_log(run_dir, rank)
    file = os.open(failures.log_path(run_dir, rank), os.O_WRONLY | os.O_APPEND)
    faulthandler.enable(file)  # a segmentation fault leaves its Python stack in the log
    if rank > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)


@contextlib.contextmanager
def _log(run_dir: Path, rank: int) -> Iterator[None]:
    """The same inside a process that lives on: Python's logging goes into the file while the block runs."""
    handlers = _open_log(run_dir, rank)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, handler in handlers:
            logging.getLogger(name).removeHandler(handler)
            handler.close()


def _open_log(run_dir: Path, rank: int) -> list[tuple[str | None, logging.Handler]]:
    """Add the rank's file to the root logger and to our own; of others' lines, rank 0 shows warnings on the terminal.

    The logger "tptrain" does not pass its lines on to the root: what of them the terminal shows is the console's business.
    """
    path = failures.log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[tuple[str | None, logging.Handler]] = [(None, file), ("tptrain", file)]
    if rank == 0:
        from tptrain.monitor.log import StderrHandler

        handlers.append((None, StderrHandler(logging.WARNING)))
    logging.captureWarnings(True)  # those of Python's module warnings: into the file too
    ours = logging.getLogger("tptrain")
    ours.propagate = False
    ours.setLevel(logging.INFO)
    for name, handler in handlers:
        logging.getLogger(name).addHandler(handler)
    return handlers
