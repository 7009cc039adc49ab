"""The command: `tptrain [verb] [Hydra overrides]`, where no verb means `train`.

Hydra runs once, here, and a verb gets the composed config and the run folder. What cannot run is refused with one
line on stderr and exit code 2, before torch is imported. Exit codes: 0 done, 1 failed, 2 refused,
75 a training that stopped on a signal or train.max_minutes and goes on when it is started again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tptrain.arguments import as_text, check_single_run, is_later_node, is_sweep, split, take_verb, without_folder
from tptrain.config import ConfigError, refuse
from tptrain.files import near
from tptrain.typed_config import store_schemas, typed_as
from tptrain.verbs import VERBS, Verb

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The config groups: beside this file in a wheel, beside the package in a checkout."""


def main() -> NoReturn:
    """Run the command line, and leave with its exit code."""
    code = 1
    try:
        code = _run(sys.argv[1:])
    except ConfigError as error:
        _say(error)
        code = 2
    except KeyboardInterrupt as stop:
        _say(f"{stop or 'stopped by SIGINT'}")
        code = getattr(stop, "exit_code", 1)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
    if code == 2:
        from tptrain import environment

        environment.let_first_rank_speak()
    if "torch" in sys.modules:
        from tptrain import ranks

        ranks.leave(code)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Hand the arguments after the verb to Hydra. Returns the exit code."""
    name = take_verb(arguments, VERBS)
    from tptrain import environment  # neither this nor Hydra imports torch

    verb = VERBS[environment.hide_verb(VERBS) or name]
    place = environment.given_place()
    if place is not None and verb.alone:
        raise ConfigError(f"tptrain {name} {verb.alone}, but this is one of a launcher's: run it without torchrun")
    flags, overrides = split(arguments)
    if not verb.keeps and is_sweep(flags, overrides):
        raise ConfigError("-m starts one job after another, but this verb has no run folders to keep them in: leave -m out")
    overrides = [as_text(override, verb.texts) for override in verb.fill_in(overrides)]
    if place is not None:
        check_single_run(flags, overrides, place)
        environment.check_restarts(place, any(override.startswith("hydra.run.dir=") for override in overrides))
    if not verb.keeps or (place is not None and place.rank > 0) or is_later_node(overrides):
        overrides = without_folder(overrides)
    sys.argv[1:] = [*flags, *overrides]
    if place is None and verb is VERBS["train"] and is_sweep(flags, overrides):
        return _sweep(overrides, lambda: _call_hydra(verb, flags, overrides))
    return _call_hydra(verb, flags, overrides)


def _sweep(overrides: list[str], start: Callable[[], int]) -> int:
    """Have Hydra run the jobs of a sweep, and show how all went, also where a signal ends it. Returns the exit code."""
    from tptrain import interrupt, launch
    from tptrain.stop import Stopped
    from tptrain.sweep import plan, pool

    reasons: list[str] = []

    def heard(number: signal.Signals) -> bool:
        begun = plan.started()
        if begun is None or not begun.in_workers:
            return False
        reasons.append(number.name)
        pool.stop(begun, number)
        return True

    plan.refuse_shared_folder(overrides)
    plan.forget()
    try:
        with interrupt.signals_stop(heard, lambda number: pool.end()):
            code = start()
        if reasons:
            raise Stopped(f"stopped by {reasons[0]}")
    except ConfigError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            error.exit_code = launch.AGAIN  # type: ignore[attr-defined]
        _conclude(0)
        raise
    return _conclude(code)


def _conclude(code: int) -> int:
    """The table of the sweep that has ended with `code`, and the exit code that its jobs make of it."""
    from tptrain import launch
    from tptrain.sweep import plan

    begun = plan.started()
    if begun is None:
        return code
    from tptrain.sweep import pool
    from tptrain.sweep.conclude import conclude

    pool.forget(begun.folder)
    return conclude(begun, launch.AGAIN) or code


def _call_hydra(verb: Verb, flags: list[str], overrides: list[str]) -> int:
    """Have Hydra run the verb, and turn what it raises into an exit code."""
    from tptrain import launch
    from tptrain.refusal import REFUSALS, explain

    try:
        _hydra_main(verb)()
    except launch.JobFailed:
        return 1  # a job of a sweep, which has said so
    except ConfigError as error:
        if getattr(error, "said_by", None) != os.getpid():
            _say(error)
        return 2
    except REFUSALS as error:
        raise explain(error, overrides, verb.schema) from error
    except OSError as error:
        raise _unmakeable(error, overrides, is_sweep(flags, overrides)) from error
    return 0


def compose(overrides: list[str], verb: str = "train") -> Any:
    """The config that the command line `overrides` asks for, typed and not yet resolved; for tests and benchmarks."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    store_schemas(VERBS[verb].schema)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose(VERBS[verb].config, [as_text(override, VERBS[verb].texts) for override in VERBS[verb].fill_in(overrides)])
        return typed_as(VERBS[verb].schema, cfg)


# ---- Hydra -----------------------------------------------------------------------------------------------


def _hydra_main(verb: Verb) -> Callable[[], Any]:
    """`hydra.main` around the verb."""
    import hydra
    from hydra.core.config_store import ConfigStore

    store_schemas(verb.schema)
    # Hydra copies the store, which is one object for the whole process, 95 times to write --help: 0.5 s.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us, and prints none itself

    def task(cfg: DictConfig) -> float | None:
        return _run_verb(verb, cfg)

    main_of: Callable[[], Any] = hydra.main(config_path=str(CONF), config_name=verb.config, version_base="1.3")(task)
    return main_of


def _run_verb(verb: Verb, cfg: DictConfig) -> float | None:
    """Run the verb as Hydra's task.

    In a sweep an error goes on to Hydra, which marks the job and runs the others. A single run leaves by SystemExit,
    which Hydra lets pass without a line of its own.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from tptrain import environment, launch
    from tptrain.failures import one_line
    from tptrain.launch import JobFailed
    from tptrain.stop import Stopped
    from tptrain.sweep.results import REFUSED

    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    sweeping = settings.mode == RunMode.MULTIRUN
    environment.give_home()
    if sweeping and "wandb" in cfg and cfg.wandb.group is None:
        cfg.wandb.group = near(settings.sweep.dir)  # where the jobs are found, on disk as in W&B
    job = f"job {settings.job.num} ({settings.job.override_dirname}): " if sweeping else ""
    try:
        if sweeping and verb is VERBS["train"] and cfg.launch.nodes > 1:
            raise refuse("launch.nodes", cfg.launch.nodes, "cannot be with -m, which is one machine's", "start each job by itself")
        value = verb.run(cfg, run_dir)
        launch.end_of_task(failed=False)
        return value
    except ConfigError as error:
        launch.end_of_task(failed=True)
        _say(f"{job}{error}")
        if sweeping and verb is VERBS["train"]:
            _keep_cause(run_dir, f"{REFUSED}{error}")
        elif settings.output_subdir is not None:
            _discard(run_dir)
        if sweeping:
            error.said_by = os.getpid()  # type: ignore[attr-defined]
            raise
        raise SystemExit(2) from error
    except Exception as error:
        launch.end_of_task(failed=True)
        if not isinstance(error, JobFailed):
            traceback.print_exception(error)
        if sweeping:
            if verb is VERBS["train"]:
                _keep_cause(run_dir, str(error) if isinstance(error, JobFailed) else one_line(error))
            raise JobFailed(f"{job}{error}") from error
        raise SystemExit(1) from error
    except Stopped as stop:
        # The other jobs have their own time; and an interrupt of a worker would have the others killed, which still save.
        if sweeping and (stop.out_of_time or _in_worker()):
            _say(f"{job}{stop}")
            raise JobFailed(f"{job}{stop}") from stop
        raise


def _in_worker() -> bool:
    """Whether this process is one of several that a launcher has started for the jobs of a sweep."""
    import multiprocessing

    return multiprocessing.current_process().name != "MainProcess"


def _keep_cause(run_dir: Path, error: str) -> None:
    """Leave in a job's folder why it failed, for the sweep's table; a launcher's ranks that have failed in training have done so."""
    from tptrain import environment, ranks
    from tptrain.monitor.status import read_status

    place = environment.given_place()
    if place is None or (place.rank == 0 and (read_status(run_dir) or {}).get("state") != "failed"):
        with contextlib.suppress(OSError):
            ranks.write_status(run_dir, "failed", error)


# ---- the run folder --------------------------------------------------------------------------------------


def _unmakeable(error: OSError, overrides: list[str], sweeping: bool) -> ConfigError:
    """The refusal of a run folder that Hydra could not make; it makes no other files."""
    key = "hydra.sweep.dir" if sweeping else "hydra.run.dir"
    given = [override.partition("=")[2] for override in overrides if override.startswith(f"{key}=")]
    remedy = f"use {key}=FOLDER with one that you may write to"
    return refuse(key, given[-1] if given else error.filename, f"cannot be made ({error.strerror})", remedy)


def _discard(run_dir: Path) -> None:
    """Remove the folder of a refused run if nothing ran in it: Hydra made it before the config could be checked."""
    here = Path.cwd()
    with contextlib.suppress(OSError):
        if {path.name for path in run_dir.iterdir()} == {".hydra"}:
            shutil.rmtree(run_dir / ".hydra")
            for folder in (run_dir, run_dir.parent):  # the parent is the day's folder
                if folder not in (here, *here.parents):
                    folder.rmdir()


def _say(message: object) -> None:
    """One line on stderr; of several ranks on a machine, the first's."""
    from tptrain import environment

    if environment.is_first_rank():
        sys.stderr.write(f"tptrain: {message}\n")
