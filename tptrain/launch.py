"""From a config to running ranks, and from their end to one word of what happened.

    this process is a rank of torchrun,     take part: rank 0 prepares the data, the others take the job from it
    or a task of srun's or submitit's
    one process is enough                   work right here
    else                                    torch elastic starts `python -m tptrain.launch WORK RUN_DIR STORE_DIR PARENT`
                                            once a rank, on this machine, over the loopback device
    launch.nodes machines                   the same on each, once their commands have met: `crew.py`

All that can be refused is refused before any of these. This is the only file that reads environment variables.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tptrain import agent_watch, failures, network, ranks, scheduler
from tptrain.config import Config, ConfigError, refuse, resolve
from tptrain.failures import Failure, JobFailed
from tptrain.job import Job, Meeting, Place
from tptrain.plan.pipeline import schedule_of
from tptrain.spawn import act_on, judge, own_ranks, run_ranks
from tptrain.stop import AGAIN, FirstAndSecond, Stopped, Wish
from tptrain.stop import numbers as stop_signals

if TYPE_CHECKING:
    from tptrain.crew import Crew

_LEAST_MINUTES = 1e-6
_AGENT_SECONDS = 10.0
"""How long torchrun's agent may take to end after its ranks, where it does not start them again."""
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
    is_first = config.launch.node_rank in (None, 0)

    def heard(number: signal.Signals) -> bool:
        if not apart:
            return wish.ask(number.name)
        if not ranks.pass_on(run_dir, own_ranks(config), number):
            return False
        wish.reason = number.name
        _wait_at_most(config.launch.stop_seconds)
        return True

    def given_up(number: signal.Signals) -> None:
        if is_first:
            ranks.write_status(run_dir, "failed", f"ended by a second signal, {number.name}")

    try:
        with signals_stop(heard, given_up, math.inf if _in_step() else 0.3, _submitit_signals()):
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
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"  # torch logs each try to reach a node that is not there; we say it once
    import torch.distributed  # noqa: F401  # which reads the level

    from tptrain import crew
    from tptrain.council import LostNode

    if level is None:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # for the ranks, each of which it would warn that an address has no name
    try:
        with crew.meet(config) as met:
            _use_interface(met.interface)
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
        _keep_flights(job.run_dir)
        return act_on(job, judge(job, run_ranks(job)))
    meeting = crew.begin()
    _keep_flights(job.run_dir)
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
            value: float | None = ranks.joined("train", config, prepare, place, wish, _keep_flights, partial(_end_agent, config, place))
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
    """Have ranks of our own, on all nodes, do `job`, and return rank 0's value.

    apart: also a single rank gets a process of its own, whose memory is free again afterwards. Raises what `start` raises.
    """
    _set_environment(job.config, None)
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
    _set_environment(job.config, place)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks.die_with_parent()

    def prepare() -> Job:
        write_job(job)
        return job

    return ranks.joined(job.work, job.config, prepare, place, job.wish, _keep_flights, partial(_end_agent, job.config, place))


def _end_agent(config: Config, place: Place, terminal: int) -> None:
    """See that torchrun's agent ends on a node that is cut off: soon after its ranks, or with restarts left once waiting is in vain."""
    if place.nodes > 1 and place.local_rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        patience = max(config.launch.timeout_seconds, ranks.START_SECONDS) if restarts > 0 else 0
        agent_watch.leave_behind(_AGENT_SECONDS + patience, terminal)


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
    place = Place(values[0], values[1], values[2], values[3], own_gpu)
    if place.world_size % place.local_world_size or place.rank % place.local_world_size != place.local_rank:
        text = f"RANK={place.rank} WORLD_SIZE={place.world_size} LOCAL_RANK={place.local_rank} LOCAL_WORLD_SIZE={place.local_world_size}"
        raise ConfigError(f"{text} are of nodes with unequal numbers of ranks: start as many on each")
    return place


def _chosen_master() -> dict[str, str]:
    """The meeting point that the user has chosen by MASTER_ADDR and MASTER_PORT."""
    return {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}


def check_restarts(place: Place, names_folder: bool) -> None:
    """Refuse to train where torchrun is to restart ranks and would do so in vain. names_folder: whether hydra.run.dir is given."""
    most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if most == "0":
        return
    if not names_folder:
        raise ConfigError(f"torchrun --max-restarts={most} would begin anew in another run folder each time: use hydra.run.dir=FOLDER")
    if place.nodes > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"torchrun --max-restarts={most} over several nodes starts ranks again in a store that still holds the last start's keys: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node and use --rdzv-backend=c10d, or use launch.nodes and train.max_restarts"
        )


def is_first_rank() -> bool:
    """Whether this process speaks for its terminal: it is rank 0, or the first of torchrun's on this machine, or no rank of anybody's."""
    rank = os.environ.get("RANK", "0")
    return (os.environ.get("LOCAL_RANK", rank) if "TORCHELASTIC_RUN_ID" in os.environ else rank) == "0"


def let_first_rank_speak() -> None:
    """Before another rank leaves with a refusal: torchrun and srun stop all ranks, also the first, which is still to say it."""
    if not is_first_rank() and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(10)  # cut short by torchrun, once the first has left
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


def _set_environment(config: Config, place: Place | None) -> None:
    """Set what torch's libraries read when they load, here and in the ranks that inherit it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are split among processes, and its threads do not survive a fork
    on_this_machine = place.local_world_size if place else len(own_ranks(config))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(ranks.threads(config, on_this_machine))
    if config.launch.nodes > 1:
        return  # until the nodes have met
    if place is None or place.nodes == 1:
        # Else gloo looks this host's name up, which waits 10-20 s for a name server that does not answer.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    elif (master := os.environ.get("MASTER_ADDR")) is not None:
        try:
            _use_interface(network.interface_to(master))
        except OSError as error:
            rule = f"cannot be found from here ({error.strerror})"
            raise refuse("MASTER_ADDR", master, rule, "use torchrun --local-addr or --master-addr, with an address of node 0") from error


def _use_interface(name: str | None) -> None:
    """Have gloo and NCCL speak over a network interface, unless the user has named others."""
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def give_home() -> None:
    """Where the user has no home directory that can be written, as in some containers, have libraries keep caches among the temporary
    files instead.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is not None and os.access(home, os.W_OK):
        return
    place = Path(tempfile.gettempdir(), f"tptrain-{os.getuid()}")
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
    if place.is_symlink() or not place.is_dir() or place.stat().st_uid != os.getuid():  # somebody else's
        place = Path(tempfile.mkdtemp(prefix="tptrain-"))
    if home is None:
        os.environ["HOME"] = str(place)
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):
        os.environ.setdefault(name, str(place / "cache"))


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


def _rank_main(work: str, run_dir: str, store_dir: str, parent: str, meeting: str | None = None) -> None:
    """Entry of a rank that `_run_ranks` started."""
    ranks.die_with_parent(int(parent))
    place = given_place()
    assert place is not None
    others = None if meeting is None else Meeting(**json.loads(meeting))
    if others is not None:  # torch elastic counts this machine's ranks alone
        place = replace(place, rank=others.first_rank + place.rank, world_size=others.world_size)
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    ranks.spawned(work, Path(run_dir), Path(store_dir), place, others)


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
