"""From a config to running ranks, and from their end to one word of what happened.

    this process is a rank of torchrun,     take part: rank 0 prepares the data, the others take the job from it
    or a task of srun's or submitit's
    one process is enough                   work right here
    else                                    torch elastic starts `python -m tptrain.launch WORK RUN_DIR STORE_DIR PARENT`
                                            once a rank, on this machine, over the loopback device

All that can be refused is refused before any of these. This is the only file that reads environment variables.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from tptrain import failures, ranks, scheduler
from tptrain.config import Config, ConfigError, refuse, resolve
from tptrain.failures import Failure, JobFailed
from tptrain.job import Job, Place
from tptrain.plan.pipeline import schedule_of
from tptrain.stop import AGAIN, FirstAndSecond, Stopped, Wish
from tptrain.stop import numbers as stop_signals

_SHUTDOWN_SECONDS = 10
"""How long ranks may take to end after a signal before they are killed."""

_LEAST_MINUTES = 1e-6
"""What train.max_minutes leaves to a restart once it has passed: the ranks stop after one step."""


def start(config: Config, run_dir: Path, place: Place | None, apart: bool = False) -> float | None:
    """Train `config` in `run_dir`, and return the final validation loss, or None where there is none.

    config: typed, not yet resolved. place: this process among a launcher's, or None where the ranks are ours to start.
    apart: also a single rank gets a process of its own, so that what ends it does not end this one.
    Raises ConfigError before a rank starts, JobFailed when a failure has been shown, Stopped (its exit code is AGAIN) where a signal or
    train.max_minutes ended it, and whatever training in this process raises.
    """
    config = settle(config, place)
    _set_environment(config, place)
    if place is not None:
        return _take_part(config, run_dir, place)
    wish, apart = Wish(), apart or config.processes > 1 or config.train.max_restarts > 0

    def heard(number: signal.Signals) -> bool:
        if not apart:
            return wish.ask(number.name)
        if not ranks.pass_on(run_dir, config.processes, number):
            return False
        wish.reason = number.name
        _wait_at_most(config.launch.stop_seconds)
        return True

    def given_up(number: signal.Signals) -> None:
        ranks.write_status(run_dir, "failed", f"ended by a second signal, {number.name}")

    try:
        with signals_stop(heard, given_up, math.inf if _in_step() else 0.3, _submitit_signals()):
            return _train(replace(_prepare(config, run_dir), wish=wish), apart)
    except Stopped as stop:
        stop.exit_code = AGAIN
        ranks.write_status(run_dir, "stopped")
        _let_submitit_requeue(wish)
        raise


def _train(job: Job, apart: bool) -> float | None:
    """Train here, or in ranks of our own, and keep the error where it fails."""
    try:
        value: float | None = _persevere(job) if apart else ranks.inline(job)
        return value
    except Exception as error:
        told = isinstance(error, (JobFailed, ConfigError))
        ranks.write_status(job.run_dir, "failed", str(error) if told else failures.one_line(error))
        raise


def _persevere(job: Job) -> Any:
    """Have ranks of our own train; where one fails, start them again, up to train.max_restarts times.

    A run that diverges would diverge again, and one that was asked to stop is not to go on: these are not started again.
    """
    from tptrain.checkpoint.folder import complete_checkpoints, home_of

    most, minutes, began = job.config.train.max_restarts, job.config.train.max_minutes, time.monotonic()
    for attempt in range(1, most + 1):
        try:
            return _spawn(job)
        except JobFailed as failed:
            if failed.kind == "diverged" or job.wish.reason is not None:
                raise
            newest = complete_checkpoints(home_of(job.config.checkpoint, job.run_dir))
            failures.say(f"tptrain: restart {attempt} of {most}, from {newest[-1].name if newest else 'where the run began'}")
        if newest:  # what the run began from is behind it
            job.config.checkpoint.resume = "auto"
        if minutes is not None:  # they count for all attempts together
            job.config.train.max_minutes = max(minutes - (time.monotonic() - began) / 60, _LEAST_MINUTES)
        write_job(job)
    return _spawn(job)


def _take_part(config: Config, run_dir: Path, place: Place) -> float | None:
    """Train as one of a launcher's ranks.

    Until the training listens a signal ends a rank at once, also in a collective, where it runs no Python; only rank 0 raises Stopped
    while it prepares the data.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks.die_with_parent()
    wish, scheduled = Wish(), _scheduled()

    def prepare() -> Job:
        with signals_stop():
            return _prepare(config, run_dir)

    def listen() -> None:
        if scheduled:  # what to come back to: a scheduler repeats itself, and srun ends all tasks once one has left
            for number in stop_signals():
                signal.signal(number, signal.SIG_IGN)
        echo_seconds = math.inf if scheduled else 1.0
        listening.enter_context(signals_stop(lambda number: wish.ask(number.name), None, echo_seconds, _submitit_signals()))

    try:
        with contextlib.ExitStack() as listening:
            wish.announce = listen
            value: float | None = ranks.joined("train", config, prepare, place, wish, _keep_flights)
            return value
    except Stopped as stop:
        stop.exit_code = AGAIN
        if place.rank == 0:
            ranks.write_status(run_dir, "stopped")
            _let_submitit_requeue(wish)
        elif scheduled:
            stop.exit_code = 0  # rank 0 leaves last and speaks for all: whoever leaves with another code has the rest ended
            if _submitit_signals():
                raise SystemExit(0) from None  # no result, as there is none yet
        raise


def _let_submitit_requeue(wish: Wish) -> None:
    """In a job of submitit's that has stopped and saved: queue it again, and leave.

    Raises JobFailed where somebody ended the job, who does not want it back.
    """
    signals = _submitit_signals()
    if signals and wish.reason in ("SIGTERM", "SIGINT", "SIGHUP"):
        raise JobFailed(f"stopped by {wish.reason}")
    for number in signals:
        signal.raise_signal(number)


def _submitit_signals() -> list[signal.Signals]:
    """The signal by which submitit stops a job, and by which it is told to queue it again; empty where this is none of its jobs."""
    name = scheduler.submitit_signal(os.environ)
    return [signal.Signals[name]] if name else []


def _scheduled() -> bool:
    """Whether a scheduler has started this rank, and not torchrun inside of a scheduler's task."""
    return "TORCHELASTIC_RUN_ID" not in os.environ and bool(scheduler.rank_variables(os.environ))


def _in_step() -> bool:
    """Whether SLURM has started this process, and no user in a shell."""
    return "SLURM_STEP_ID" in os.environ and not (sys.stdin and sys.stdin.isatty())


def end_of_task(failed: bool) -> None:
    """Once the verb has ended in a job of submitit's: have this process, which is submitit's own, leave with 1 if it failed.

    submitit keeps the result and then leaves with 0, so that SLURM would call a job of failed ranks completed.
    """
    if _submitit_signals():
        atexit.register(ranks.leave, int(failed))


def run(job: Job, apart: bool = False) -> Any:
    """Have ranks of our own do `job`, and return rank 0's value.

    apart: also a single rank gets a process of its own, whose memory is free again afterwards. Raises what `start` raises.
    """
    _set_environment(job.config, None)
    write_job(job)
    return ranks.inline(job) if job.config.processes == 1 and not apart else _spawn(job)


def take_part(job: Job, place: Place) -> Any:
    """Do rank 0's `job` as one of a launcher's ranks, which a signal ends at once; this rank's value. Raises what `ranks.joined` does."""
    _set_environment(job.config, place)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks.die_with_parent()

    def prepare() -> Job:
        write_job(job)
        return job

    return ranks.joined(job.work, job.config, prepare, place, job.wish, _keep_flights)


def given_place() -> Place | None:
    """This process among those that torchrun (or another launcher) started, or None where nobody did.

    What a scheduler says in variables of its own, is set in those that torchrun uses. Raises ConfigError where the launcher's variables
    are incomplete.
    """
    if "RANK" not in os.environ:
        os.environ.update({**scheduler.rank_variables(os.environ), **_chosen_master()})
    if "RANK" not in os.environ:
        return None
    values = []
    for name, default in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if text is None or not text.isdecimal():
            rank = os.environ["RANK"]
            raise ConfigError(f"RANK={rank} is set, but {name}={text or ''} is no number: start with torchrun, or unset RANK")
        values.append(int(text))
    own_gpu = _scheduled() and scheduler.has_own_gpu(os.environ)
    return Place(values[0], values[1], values[2], values[3], own_gpu)


def _chosen_master() -> dict[str, str]:
    """The meeting point that the user has chosen by MASTER_ADDR and MASTER_PORT."""
    return {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}


def is_first_rank() -> bool:
    """Whether this process speaks for the job: it is rank 0, or no rank of anybody's."""
    return os.environ.get("RANK", "0") == "0"


def let_rank_0_speak() -> None:
    """Before another rank leaves with a refusal: torchrun and srun stop all ranks, also a rank 0 that is still to say it."""
    if not is_first_rank() and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(10)  # cut short by torchrun, once rank 0 has left
    elif not is_first_rank() and "SLURM_STEP_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the exit code, srun's is the largest
        time.sleep(3)


def hide_verb(verbs: Iterable[str]) -> str | None:
    """Take the verb out of the line that tab completion asks about, and return it: Hydra completes overrides only."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) > 2 and words[1] in verbs:
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
        return words[1]
    return None


def settle(config: Config, place: Place | None) -> Config:
    """The resolved config, with the device chosen and the schedule proved. Raises ConfigError.

    Checked without counting GPUs first: that imports torch, and most refusals do not depend on it. The schedule comes last: the number
    of micro-batches may follow from dp, and dp from the GPUs.
    """
    started = place.world_size if place else None
    resolved = resolve(config, started)
    if config.hardware.device != "cpu":
        gpus = count_gpus()
        if gpus == 0 and config.hardware.device == "cuda":
            raise refuse("hardware.device", "cuda", "needs a GPU, and this machine shows none", "use hardware.device=cpu or auto")
        if place and not place.own_gpu and 0 < gpus < place.local_world_size:
            rule = f"gives each rank a GPU, but this machine has {gpus} for {place.local_world_size} ranks"
            raise refuse("hardware.device", config.hardware.device, rule, f"start {gpus} a machine, or use hardware.device=cpu")
        if gpus:
            resolved = resolve(config, started, gpus)
        resolved.hardware.device = "cuda" if gpus else "cpu"
    schedule_of(resolved)
    return resolved


def count_gpus() -> int:
    """GPUs that torch can use. Where the driver has no device file there are none, and torch is not imported."""
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0")):
        return 0
    import torch

    return torch.cuda.device_count()


# ---- before the ranks ------------------------------------------------------------------------------------


def _prepare(config: Config, run_dir: Path) -> Job:
    """Look for the checkpoint or the weights to start from, tokenise once, write the tokenizer and `config.yaml`, make the log folder.

    Raises ConfigError.
    """
    from tptrain.checkpoint.hugging_face.folder import check_folder
    from tptrain.checkpoint.start import find_start, make_home, pass_over
    from tptrain.data import keep_tokenizer, prepare

    make_home(config)
    damage: dict[Path, str] = {}
    start = find_start(config, run_dir, damage)
    if start is None and config.train.init_from is not None:
        check_folder(config.train.init_from, config.model)
    job = Job("train", config, run_dir.absolute(), prepare(config, print))
    keep_tokenizer(config.data, job.store_dir, job.run_dir, start)
    write_job(job)
    for line in pass_over(damage, start):
        failures.say(f"tptrain: {line}")
    return job


def write_job(job: Job) -> None:
    """Write `config.yaml` for the ranks, and clear the log folder of what an earlier start said. Raises ConfigError."""
    try:
        (job.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        ranks.forget(job.run_dir, job.config.processes)
        job.save()
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise refuse("hydra.run.dir", job.run_dir, rule, "use hydra.run.dir=FOLDER with one that you can") from error


def _set_environment(config: Config, place: Place | None) -> None:
    """Set what torch's libraries read when they load, here and in the ranks that inherit it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are split among processes, and its threads do not survive a fork
    on_this_machine = place.local_world_size if place else config.processes
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(ranks.threads(config, on_this_machine))
    if place is None or place.local_world_size == place.world_size:
        # Else gloo looks this host's name up, which waits 10-20 s for a name server that does not answer.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")


def _keep_flights(run_dir: Path) -> None:
    """Have NCCL's flight recorder write a rank's last communications into the run's logs before a time limit ends the rank.

    Each rank makes a file `flight-nccl-N`, which `torchfrtrace` reads. The last name is an older one of the one before.
    """
    prefix = str(run_dir.absolute() / "logs" / f"{failures.FLIGHT}nccl-")
    os.environ.update(TORCH_NCCL_DUMP_ON_TIMEOUT="1", TORCH_FR_DUMP_TEMP_FILE=prefix, TORCH_NCCL_DEBUG_INFO_TEMP_FILE=prefix)


@contextlib.contextmanager
def signals_stop(
    heard: Callable[[signal.Signals], bool] | None = None,
    given_up: Callable[[signal.Signals], None] | None = None,
    echo_seconds: float = 0.3,
    also: Iterable[signal.Signals] = (),
) -> Iterator[None]:
    """In the block the first signal that asks to stop raises Stopped, unless `heard` takes care of it; the second ends the process.

    heard: says whether it did. given_up: called before the process ends. echo_seconds: what comes so soon after the first signal is that
    one again. Ranks that are still there then die with the process (`ranks.die_with_parent`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = FirstAndSecond(echo_seconds)

    def stop(number: int, frame: FrameType | None) -> None:
        count = seen.count()
        if count == 0:
            return
        if count > 1:
            failures.show_cursor()
            if given_up is not None:
                given_up(signal.Signals(number))
            os._exit(1)
        if heard is None or not heard(signal.Signals(number)):
            raise Stopped(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in (*stop_signals(), *also)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_at_most(seconds: float) -> None:
    """Raise Stopped in the main thread after so long, which ends ranks that are still there; the end of `signals_stop` calls it off."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped, but the ranks did not end within launch.stop_seconds={seconds:g}")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)


# ---- ranks of our own ------------------------------------------------------------------------------------


def _spawn(job: Job) -> Any:
    """Start the ranks and wait for them. Raises JobFailed after showing the cause, ConfigError if the ranks refused."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.config.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=_SHUTDOWN_SECONDS,
        signals_to_handle="SIGQUIT",  # the others are ours: see signals_stop
    )
    _keep_flights(job.run_dir)
    command = ("-u", "-m", "tptrain.launch", job.work, str(job.run_dir), str(job.store_dir), str(os.getpid()))
    try:
        with _quiet_elastic():
            elastic_launch(settings, sys.executable)(*command)
    except ChildFailedError as error:
        exits = {rank: (failure.exitcode, float(failure.timestamp)) for rank, failure in error.failures.items()}
        cause = failures.root_cause(job.run_dir, exits)
        if job.wish.reason is not None and cause.kind in ("killed", "lost_peer"):  # some had left the training, or not yet begun it
            raise Stopped(f"stopped by {job.wish.reason}") from None
        raise _tell(job.run_dir, cause) from None
    finally:
        failures.show_cursor()
    result = json.loads(ranks.result_path(job.run_dir).read_text())
    if "stopped" in result:
        raise Stopped(result["stopped"])
    return result["value"]


def _tell(run_dir: Path, cause: Failure) -> Exception:
    """Show the root cause; the exception to raise for it."""
    if cause.kind == "refused":
        return ConfigError(cause.error)
    failures.say(failures.describe(cause, run_dir))
    between = " " if cause.kind in ("killed", "exit") else ": "
    return JobFailed(f"rank {cause.rank}{between}{cause.error}", cause.kind)


@contextlib.contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Keep torch elastic from logging to the terminal, and from asking a name server who we are for its event log."""
    logger = logging.getLogger("torch.distributed.elastic")
    silence, propagate, full_name = logging.NullHandler(), logger.propagate, socket.getfqdn
    logger.addHandler(silence)
    logger.propagate = False
    socket.getfqdn = lambda name="": name or socket.gethostname()
    try:
        yield
    finally:
        socket.getfqdn = full_name
        logger.propagate = propagate
        logger.removeHandler(silence)


def _rank_main(work: str, run_dir: str, store_dir: str, parent: str) -> None:
    """Entry of a rank that `_spawn` started."""
    ranks.die_with_parent(int(parent))
    place = given_place()
    assert place is not None
    ranks.spawned(work, Path(run_dir), Path(store_dir), place)


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
