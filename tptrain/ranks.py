"""What one rank does around its work: log, threads, process group, the work, leave.

    started by us     python -m tptrain.launch WORK RUN_DIR STORE_DIR PARENT     `spawned`
    by torchrun       torchrun -m tptrain ...                                    `joined`
    the only one      inside the command's own process                           `inline`

In all three, the work (a name in `WORKS`: train, ...) finds a default process group, this rank's log in `logs/rank-N.log`,
and the number of threads it may compute with. Nothing here reads the environment: `launch.py` did, and passes a `Place`.
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

from tptrain import failures, lifeline
from tptrain.config import Config
from tptrain.generate_config import GenerateConfig
from tptrain.host_memory import keep_freed_memory
from tptrain.job import ALONE, Job, Meeting, Place
from tptrain.stop import ON_BEHALF, Stopped, Wish, follow_launcher

_LONG = timedelta(days=30)
"""More than any preparation takes. Whoever waits so long is released earlier, with an error, where rank 0 dies."""

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


@dataclass(frozen=True)
class Work:
    """One thing that ranks can do."""

    run: Callable[[Job], Any]
    """Every rank calls it; rank 0's value, which JSON can hold, goes back to the launcher."""
    config: type = Config
    """The schema of the job's `config.yaml`. It has the groups `hardware` and `launch`, and `processes`."""


WORKS = {
    "train": Work(_train),
    "check-twin": Work(_check_twin),
    "check-layout": Work(_check_layout),
    "generate": Work(_generate, GenerateConfig),
}
"""By the name that travels to the ranks."""


# ---- the three ways in -----------------------------------------------------------------------------------


def inline(job: Job) -> Any:
    """Work in this very process: a group of one in memory, no network, and a debugger works. Returns the work's value."""
    with _log(job.run_dir, 0):
        _join_group(job.config, ALONE)
        try:
            return WORKS[job.work].run(job)
        except Exception as error:
            failures.record(job.run_dir, 0, error)
            raise
        finally:
            _leave_group()


def joined(config: Config, prepare: Callable[[], Job], place: Place, wish: Wish) -> Any:
    """Work as one of torchrun's ranks. prepare: makes the job; rank 0 calls it, and the others take the job from rank 0. wish: tells this
    rank to stop.

    Raises JobFailed once this rank's failure is recorded and told, Stopped once all ranks have stopped, and what `prepare` raises.
    """
    terminal = os.dup(sys.stderr.fileno())
    run_dir: Path | None = None
    try:
        job, store_dir, store = _meet(config, prepare, place)
        run_dir = job.run_dir if job else None
        _join_group(config, place, store)
        job = dataclasses.replace(_from_rank_0(job), wish=wish)
        job = dataclasses.replace(job, store_dir=store_dir or job.store_dir)
        run_dir = job.run_dir
        _keep_log(run_dir, place.rank)
        return WORKS[job.work].run(job)
    except Stopped:
        if wish.listening:
            _wait_for_all()  # torchrun ends the others as soon as one has left with an exit code that is not 0
        raise
    except Exception as error:
        if run_dir is None:
            raise
        failure = failures.record(run_dir, place.rank, error, _waited_for(error))
        if failure.kind != "lost_peer":
            os.write(terminal, f"{failures.describe(failure, run_dir)}\n".encode())
            time.sleep(0.5)  # until rank 0 waits for us, else its "running" may come after our "failed", and torchrun then stops it
            write_status(run_dir, "failed", f"rank {place.rank}: {failure.error}")
        elif place.local_rank == 0:  # speaks for all followers here; the rank with the cause, if it lives, speaks for itself
            _tell_of_loss(run_dir, place, failure, terminal)
        raise failures.JobFailed(failure.error) from error


def spawned(work: str, run_dir: Path, store_dir: Path, place: Place, meeting: Meeting | None = None) -> NoReturn:
    """Work as a rank that `launch.py` started, and leave the process. The launcher says what went wrong, not we.

    meeting: where the ranks of other nodes are, if there are any.
    """
    wish = Wish(announce=partial(_write_pid, run_dir, place.rank))
    follow_launcher(wish, os.getppid())
    _keep_log(run_dir, place.rank)
    try:
        job = dataclasses.replace(Job.load(work, run_dir, store_dir, WORKS[work].config), wish=wish)
        _join_group(job.config, place, _find_others(meeting, place, job.config.launch.timeout_seconds) if meeting else None)
        value = WORKS[work].run(job)
        if place.rank == 0:
            result_path(run_dir).write_text(json.dumps({"value": value}))
    except Stopped as stop:
        if place.rank == 0:
            result_path(run_dir).write_text(json.dumps({"stopped": str(stop)}))
    except Exception as error:
        failures.record(run_dir, place.rank, error, _waited_for(error))
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


def _wait_for_all() -> None:
    """Return once all ranks are here, or one of them is gone."""
    import torch
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):
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


def _meet(config: Config, prepare: Callable[[], Job], place: Place) -> tuple[Job | None, Path | None, Any]:
    """Rank 0's job, once it is prepared, on rank 0 alone; the token store of this node, where it may be another than rank 0's; and the
    store over which torchrun's ranks find each other.

    To tokenise may take hours, so the other ranks wait here as long as rank 0 lives; only then does launch.timeout_seconds count.
    """
    import torch.distributed as dist

    timeout, key = timedelta(seconds=config.launch.timeout_seconds), "tptrain/prepared"
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    job, store_dir = None, None
    if place.nodes > 1:
        job, store_dir = _meet_nodes(config, prepare, place, dist.PrefixStore("tptrain/nodes", store))
    else:
        if place.rank == 0:
            job = prepare()
            store.set(key, "")
        store.wait([key], _LONG)
    store.set_timeout(timeout)
    return job, store_dir, dist.PrefixStore("tptrain/group", store)


def _meet_nodes(config: Config, prepare: Callable[[], Job], place: Place, store: Any) -> tuple[Job | None, Path]:
    """The same over several nodes: rank 0's job, and this node's token store. The first rank of each node speaks for it."""
    from tptrain.council import Council
    from tptrain.nodes import prepare_together

    jobs: list[Job] = []

    def prepare_first() -> Job:
        jobs.append(prepare())
        return jobs[0]

    seconds, listener = config.launch.timeout_seconds, place.local_rank > 0
    with Council(store.clone, place.node, place.nodes, seconds, listener) as council:
        _, store_dir = prepare_together(council, config, prepare_first)
    return (jobs[0] if jobs else None), store_dir


def _find_others(meeting: Meeting, place: Place, timeout_seconds: float) -> Any:
    """The store in which the ranks of all nodes find each other, once all have come."""
    from torch.distributed import TCPStore

    from tptrain import roll_call

    timeout = timedelta(seconds=timeout_seconds)
    store = roll_call.store_of_attempt(TCPStore(meeting.host, meeting.port, None, False, timeout=timeout), meeting.attempt)
    roll_call.muster(store, place.rank, place.world_size, timeout_seconds)
    return store


def _join_group(config: Config, place: Place, store: Any = None) -> None:
    """Make the default process group: gloo, and NCCL too on GPUs. One rank alone needs no network. store: where torchrun's ranks met."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads(config, place.local_world_size))
    keep_freed_memory()
    on_gpu = config.hardware.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    store = dist.HashStore() if store is None and place == ALONE else store
    known = {"store": store, "rank": place.rank, "world_size": place.world_size} if store is not None else {}
    timeout = timedelta(seconds=config.launch.timeout_seconds)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, **known)


def _waited_for(error: Exception) -> list[int]:
    """Tell the others that this rank has fallen; the ranks that it waited for in vain, as far as that can be known."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    from tptrain import roll_call

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    store = _get_default_store()
    roll_call.fall(store, dist.get_rank())
    if not failures.timed_out(error):
        return []
    named = failures.named_peer(error)
    return [named] if named is not None else list(roll_call.missing(store, dist.get_world_size()))


def _tell_of_loss(run_dir: Path, place: Place, failure: failures.Failure, terminal: int) -> None:
    """Say on the terminal that this machine's ranks lost another one, and why if that is known; rank 0 writes it into the status too."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    from tptrain import roll_call

    cause = failures.recorded_cause(run_dir)
    told = f"rank {cause.rank}: {cause.error}" if cause else ""
    if not told and place.nodes > 1 and failure.waited_for is None and dist.is_initialized():
        gone = roll_call.missing(_get_default_store(), place.world_size)
        told = f"no word from rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}" if gone else ""
    elif not told and place.nodes > 1:
        told = failure.error
    lost = f"rank {place.rank} lost another rank" + f" ({told})" * bool(told)
    os.write(terminal, f"tptrain: {lost}; its log: {failures.log_path(run_dir, place.rank)}\n".encode())
    if place.rank == 0:  # writes the status again: its last "running" may have come after the other's "failed"
        write_status(run_dir, "failed", told if cause else lost)


def threads(config: Config, local_ranks: int) -> int:
    """CPU threads for this rank: the number asked for, or this machine's cores shared by its ranks."""
    asked = config.launch.threads_per_rank
    if asked != "auto":
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks)


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


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
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        handlers.append((None, terminal))
    ours = logging.getLogger("tptrain")
    ours.propagate = False
    ours.setLevel(logging.INFO)
    for name, handler in handlers:
        logging.getLogger(name).addHandler(handler)
    return handlers
