"""From a config to running ranks, and from their end to one word of what happened.

    this process is a rank of torchrun,     take part: rank 0 prepares the data, the others take the job from it
    or a task of srun's or submitit's
    one process is enough                   work right here
    else                                    torch elastic starts `python -m tptrain.launch WORK RUN_DIR STORE_DIR PARENT`
                                            once a rank, on this machine, over the loopback device
    launch.nodes machines                   the same on each, once their commands have met: `crew.py`

All that can be refused is refused before any of these.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tptrain import environment, failures, ranks
from tptrain.config import Config, ConfigError, refuse, resolve
from tptrain.failures import Failure, JobFailed
from tptrain.interrupt import signals_stop, wait_at_most
from tptrain.job import Job, Meeting, Place
from tptrain.plan.pipeline import schedule_of
from tptrain.spawn import act_on, judge, own_ranks, run_ranks
from tptrain.stop import AGAIN, Stopped, Wish
from tptrain.stop import numbers as stop_signals

if TYPE_CHECKING:
    from tptrain.crew import Crew

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
    environment.set_up(config, place)
    if place is not None:
        return _take_part(config, run_dir, place)
    wish, apart = Wish(), apart or config.processes > 1 or config.train.max_restarts > 0
    is_first = config.launch.node_rank in (None, 0)

    def heard(number: signal.Signals) -> bool:
        if not apart:
            return wish.ask(number.name)
        if not ranks.pass_on(run_dir, own_ranks(config), number):
            return False
        wish.reason = number.name
        wait_at_most(config.launch.stop_seconds)
        return True

    def given_up(number: signal.Signals) -> None:
        if is_first:
            ranks.write_status(run_dir, "failed", f"ended by a second signal, {number.name}")

    try:
        with signals_stop(heard, given_up, math.inf if environment.in_step() else 0.3, environment.submitit_signals()):
            if config.launch.nodes == 1:
                return _train(replace(_prepare(config, run_dir), wish=wish), apart)
            with _crew(config) as crew:
                run_dir, store_dir = _prepare_together(crew, config, run_dir)
                return _train(Job("train", config, run_dir, store_dir, wish), True, crew)
    except Stopped as stop:
        stop.exit_code = AGAIN
        if is_first:
            ranks.write_status(run_dir, "stopped")
        _let_submitit_requeue(wish)
        raise


def _train(job: Job, apart: bool, crew: Crew | None = None) -> float | None:
    """Train here, or in ranks of our own, and keep the error where it fails."""
    try:
        value: float | None = _persevere(job, crew) if apart else ranks.inline(job)
        return value
    except Exception as error:
        told = isinstance(error, (JobFailed, ConfigError))
        if crew is None or crew.reports:
            ranks.write_status(job.run_dir, "failed", str(error) if told else failures.one_line(error))
        raise


def _persevere(job: Job, crew: Crew | None) -> Any:
    """Have ranks of our own train; where one fails, start them again, up to train.max_restarts times.

    A run that diverges would diverge again, and one that was asked to stop is not to go on: these are not started again.
    """
    from tptrain.checkpoint.folder import complete_checkpoints, home_of

    most, minutes, began = job.config.train.max_restarts, job.config.train.max_minutes, time.monotonic()
    for attempt in range(1, most + 1):
        try:
            return _spawn(job, crew, again=True)
        except JobFailed as failed:
            if failed.kind == "diverged" or job.wish.reason is not None or (crew is not None and crew.without is not None):
                raise
            newest = complete_checkpoints(home_of(job.config.checkpoint, job.run_dir))
            failures.say(f"tptrain: restart {attempt} of {most}, from {newest[-1].name if newest else 'where the run began'}")
        if newest:  # what the run began from is behind it
            job.config.checkpoint.resume = "auto"
        if minutes is not None:  # they count for all attempts together
            job.config.train.max_minutes = max(minutes - (time.monotonic() - began) / 60, _LEAST_MINUTES)
        if crew is None or crew.council.node == 0:
            write_job(job)
    return _spawn(job, crew)


@contextlib.contextmanager
def _crew(config: Config) -> Iterator[Crew]:
    """Meet the commands of the other nodes. Raises JobFailed, once it is told, where one of them is lost."""
    environment.load_torch_quietly()
    from tptrain import crew
    from tptrain.council import LostNode

    try:
        with crew.meet(config) as met:
            environment.use_interface(met.interface)
            yield met
    except LostNode as lost:
        failures.say(f"tptrain: {lost}")
        raise JobFailed(str(lost)) from lost


def _prepare_together(crew: Crew, config: Config, run_dir: Path) -> tuple[Path, Path]:
    """The run folder and this node's token store."""
    from tptrain.nodes import prepare_together

    run_dir, store_dir = prepare_together(crew.council, config, lambda: _prepare(config, run_dir))
    if crew.council.node > 0:
        own = own_ranks(config)
        failures.say(f"tptrain: node {crew.council.node} trains with ranks {own[0]} to {own[-1]} in {run_dir}; node 0 reports")
    return run_dir, store_dir


def _spawn(job: Job, crew: Crew | None = None, again: bool = False) -> Any:
    """Start the ranks, wait for them, and return rank 0's value.

    crew: the commands of the other nodes. again: whether a failure would not be the end. Raises JobFailed after showing the cause,
    ConfigError if the ranks refused.
    """
    if crew is None:
        environment.keep_flights(job.run_dir)
        return act_on(job, judge(job, run_ranks(job)))
    meeting = crew.begin()
    environment.keep_flights(job.run_dir)
    try:
        outcome = run_ranks(job, meeting)
    except BaseException:
        crew.fell()
        raise
    if outcome.exits:
        crew.fell()
    end = crew.conclude(outcome, partial(judge, job), again)
    job.wish.reason = job.wish.reason or end.get("asked")
    if crew.without is None or "failure" not in end:
        return act_on(job, end)
    failure = Failure(**end["failure"])
    if failure.kind == "lost_peer" and not failure.waited_for:  # the other node's ranks are gone with it, and ours found out
        failures.say(f"tptrain: {crew.without}")
        raise JobFailed(str(crew.without))
    try:
        return act_on(job, end)
    finally:
        failures.say(f"tptrain: {crew.without}")


def _take_part(config: Config, run_dir: Path, place: Place) -> float | None:
    """Train as one of a launcher's ranks.

    Until the training listens a signal ends a rank at once, also in a collective, where it runs no Python; only rank 0 raises Stopped
    while it prepares the data.
    """
    if environment.under_torchrun():
        ranks.die_with_parent()
    wish, scheduled = Wish(), environment.scheduled()

    def prepare() -> Job:
        with signals_stop():
            return _prepare(config, run_dir)

    def listen() -> None:
        if scheduled:  # what to come back to: a scheduler repeats itself, and srun ends all tasks once one has left
            for number in stop_signals():
                signal.signal(number, signal.SIG_IGN)
        echo_seconds = math.inf if scheduled else 1.0
        listening.enter_context(signals_stop(lambda number: wish.ask(number.name), None, echo_seconds, environment.submitit_signals()))

    try:
        with contextlib.ExitStack() as listening:
            wish.announce = listen
            value: float | None = _joined("train", config, prepare, place, wish)
            return value
    except Stopped as stop:
        stop.exit_code = AGAIN
        if place.rank == 0:
            ranks.write_status(run_dir, "stopped")
            _let_submitit_requeue(wish)
        elif scheduled:
            stop.exit_code = 0  # rank 0 leaves last and speaks for all: whoever leaves with another code has the rest ended
            if environment.submitit_signals():
                raise SystemExit(0) from None  # no result, as there is none yet
        raise


def _let_submitit_requeue(wish: Wish) -> None:
    """In a job of submitit's that has stopped and saved: queue it again, and leave.

    Raises JobFailed where somebody ended the job, who does not want it back.
    """
    signals = environment.submitit_signals()
    if signals and wish.reason in ("SIGTERM", "SIGINT", "SIGHUP"):
        raise JobFailed(f"stopped by {wish.reason}")
    for number in signals:
        signal.raise_signal(number)


def end_of_task(failed: bool) -> None:
    """Once the verb has ended in a job of submitit's: have this process, which is submitit's own, leave with 1 if it failed.

    submitit keeps the result and then leaves with 0, so that SLURM would call a job of failed ranks completed.
    """
    if environment.submitit_signals():
        atexit.register(ranks.leave, int(failed))


def run(job: Job, apart: bool = False) -> Any:
    """Have ranks of our own, on all nodes, do `job`, and return rank 0's value.

    apart: also a single rank gets a process of its own, whose memory is free again afterwards. Raises what `start` raises.
    """
    environment.set_up(job.config, None)
    if job.config.launch.nodes > 1:
        return _run_on_nodes(job)
    write_job(job)
    return ranks.inline(job) if job.config.processes == 1 and not apart else _spawn(job)


def _run_on_nodes(job: Job) -> Any:
    """The same with the commands of the other nodes, in node 0's run folder, which need not be shared: else each node has a copy."""
    from tptrain.nodes import agree_on, is_seen

    with _crew(job.config) as crew:
        agree_on(crew.council, job.config)

        def offer() -> str:
            if crew.council.node == 0:
                write_job(job)
            return str(job.run_dir)

        job = replace(job, run_dir=Path(crew.council.together("run folder", offer)))
        copied = crew.council.node > 0 and not is_seen(job.run_dir / "config.yaml")
        if copied:
            write_job(job)
        try:
            return _spawn(job, crew)
        finally:
            if copied:
                shutil.rmtree(job.run_dir, ignore_errors=True)


def take_part(job: Job, place: Place) -> Any:
    """Do rank 0's `job` as one of a launcher's ranks, which a signal ends at once; this rank's value. Raises what `ranks.joined` does."""
    environment.set_up(job.config, place)
    if environment.under_torchrun():
        ranks.die_with_parent()

    def prepare() -> Job:
        write_job(job)
        return job

    return _joined(job.work, job.config, prepare, place, job.wish)


def _joined(work: str, config: Config, prepare: Callable[[], Job], place: Place, wish: Wish) -> Any:
    """Work as one of a launcher's ranks: see `ranks.joined`."""
    return ranks.joined(work, config, prepare, place, wish, environment.keep_flights, partial(environment.end_agent, place))


def settle(config: Config, place: Place | None) -> Config:
    """The resolved config, with the device chosen and the schedule proved. Raises ConfigError.

    Checked without counting GPUs first: that imports torch, and most refusals do not depend on it. The schedule comes last: the number
    of micro-batches may follow from dp, and dp from the GPUs.
    """
    started, here = (place.world_size, place.local_world_size) if place else (None, None)
    resolved = resolve(config, started, None, here)
    if config.hardware.device != "cpu":
        gpus = count_gpus()
        if gpus == 0 and config.hardware.device == "cuda":
            raise refuse("hardware.device", "cuda", "needs a GPU, and this machine shows none", "use hardware.device=cpu or auto")
        if place and not place.own_gpu and 0 < gpus < place.local_world_size:
            rule = f"gives each rank a GPU, but this machine has {gpus} for {place.local_world_size} ranks"
            raise refuse("hardware.device", config.hardware.device, rule, f"start {gpus} a machine, or use hardware.device=cpu")
        if gpus:
            resolved = resolve(config, started, gpus, here)
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
    from tptrain.monitor.text import tell

    make_home(config)
    damage: dict[Path, str] = {}
    start = find_start(config, run_dir, damage)
    if start is None and config.train.init_from is not None:
        check_folder(config.train.init_from, config.model)
    job = Job("train", config, run_dir.absolute(), prepare(config, tell))
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


# ---- ranks of our own ------------------------------------------------------------------------------------


def _rank_main(work: str, run_dir: str, store_dir: str, parent: str, meeting: str | None = None) -> None:
    """Entry of a rank that `_run_ranks` started."""
    ranks.die_with_parent(int(parent))
    place = environment.given_place()
    assert place is not None
    others = None if meeting is None else Meeting(**json.loads(meeting))
    if others is not None:  # torch elastic counts this machine's ranks alone
        place = replace(place, rank=others.first_rank + place.rank, world_size=others.world_size)
        environment.set_rank(place)
    ranks.spawned(work, Path(run_dir), Path(store_dir), place, others)


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
