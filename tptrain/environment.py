"""What the environment's variables say about this process, and what it sets in them for torch's libraries and for the ranks that inherit
them. This is the only file that reads or sets any.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tptrain import agent_watch, failures, network, ranks, scheduler
from tptrain.config import Config, ConfigError, refuse
from tptrain.job import Place
from tptrain.spawn import own_ranks

_AGENT_SECONDS = 10.0
"""How long torchrun's agent may take to end after its ranks, where it does not start them again."""
_REJOIN_SECONDS = 900.0
"""How long it may wait for other nodes where it does: more than torchrun's own limit of 600 s, unless that was changed."""


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
    own_gpu = scheduled() and scheduler.has_own_gpu(os.environ)
    place = Place(values[0], values[1], values[2], values[3], own_gpu)
    if place.world_size % place.local_world_size or place.rank % place.local_world_size != place.local_rank:
        text = f"RANK={place.rank} WORLD_SIZE={place.world_size} LOCAL_RANK={place.local_rank} LOCAL_WORLD_SIZE={place.local_world_size}"
        raise ConfigError(f"{text} are of nodes with unequal numbers of ranks: start as many on each")
    return place


def _chosen_master() -> dict[str, str]:
    """The meeting point that the user has chosen by MASTER_ADDR and MASTER_PORT."""
    return {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def scheduled() -> bool:
    """Whether a scheduler has started this rank, and not torchrun inside of a scheduler's task."""
    return not under_torchrun() and bool(scheduler.rank_variables(os.environ))


def in_step() -> bool:
    """Whether SLURM has started this process, and no user in a shell."""
    return "SLURM_STEP_ID" in os.environ and not (sys.stdin and sys.stdin.isatty())


def set_rank(place: Place) -> None:
    """Tell this process its number in the whole job."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.world_size)


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
    return (os.environ.get("LOCAL_RANK", rank) if under_torchrun() else rank) == "0"


def let_first_rank_speak() -> None:
    """Before another rank leaves with a refusal: torchrun and srun stop all ranks, also the first, which is still to say it."""
    if not is_first_rank() and under_torchrun():
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


def set_up(config: Config, place: Place | None) -> None:
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
            use_interface(network.interface_to(master))
        except OSError as error:
            rule = f"cannot be found from here ({error.strerror})"
            raise refuse("MASTER_ADDR", master, rule, "use torchrun --local-addr or --master-addr, with an address of node 0") from error


def use_interface(name: str | None) -> None:
    """Have gloo and NCCL speak over a network interface, unless the user has named others."""
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def load_torch_quietly() -> None:
    """Import torch.distributed such that it does not log each try to reach a node that is not there: we say it once."""
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"
    import torch.distributed  # noqa: F401  # which reads the level

    if level is None:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # for the ranks, each of which it would warn that an address has no name


def keep_flights(run_dir: Path) -> None:
    """Have NCCL's flight recorder write a rank's last communications into the run's logs before a time limit ends the rank.

    Each rank makes a file `flight-nccl-N`, which `torchfrtrace` reads. The last name is an older one of the one before.
    """
    prefix = str(run_dir.absolute() / "logs" / f"{failures.FLIGHT}nccl-")
    os.environ.update(TORCH_NCCL_DUMP_ON_TIMEOUT="1", TORCH_FR_DUMP_TEMP_FILE=prefix, TORCH_NCCL_DEBUG_INFO_TEMP_FILE=prefix)


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


def cache_folder() -> Path:
    """Where this user's caches of tptrain lie; made if need be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tptrain")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def submitit_signals() -> list[signal.Signals]:
    """The signal by which submitit stops a job, and by which it is told to queue it again; empty where this is none of its jobs."""
    name = scheduler.submitit_signal(os.environ)
    return [signal.Signals[name]] if name else []


def end_agent(place: Place, terminal: int) -> None:
    """See that torchrun's agent ends on a node that is cut off: soon after its ranks, or with restarts left once waiting is in vain."""
    if place.nodes > 1 and place.local_rank == 0 and under_torchrun():
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        agent_watch.leave_behind(_REJOIN_SECONDS if restarts > 0 else _AGENT_SECONDS, terminal)
