"""The command: `tptrain [verb] [Hydra overrides]`, where no verb means `train`.

Hydra runs once, here, and a verb gets the composed config and the run folder. What cannot run is refused with one
line on stderr and exit code 2, before torch is imported. Exit codes: 0 done, 1 failed, 2 refused,
75 a training that stopped on a signal or train.max_minutes and goes on when it is started again.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tptrain.config import Config, ConfigError, refuse, resolve
from tptrain.eval_config import EvalConfig
from tptrain.export_config import ExportConfig
from tptrain.files import near
from tptrain.generate_config import GenerateConfig
from tptrain.own_data import filled_in
from tptrain.plot_config import PlotConfig
from tptrain.slurm.options import SlurmConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from tptrain.job import Place

_PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The config groups: beside this file in a wheel, beside the package in a checkout."""

C = TypeVar("C")


@dataclass(frozen=True)
class Verb:
    """What the command can be asked to do."""

    run: Callable[[DictConfig, Path], float | None]
    """From the composed config and the run folder to the value that a sweep compares, if there is one."""
    config: str = "config"
    """The primary config: its file in `conf/`."""
    schema: type = Config
    texts: Mapping[str, str] = field(default_factory=dict)
    """Words whose value on the command line is text as it stands, though Hydra would read more into some characters or into the
    word, and the keys that they set."""
    fill_in: Callable[[list[str]], list[str]] = list
    """From the overrides to these and what follows from them, before Hydra composes."""
    keeps: bool = True
    """Whether it has a run folder; only then may `-m` start it several times."""


def train(cfg: DictConfig, run_dir: Path) -> float | None:
    """Train a model; in the same run folder again: resume. The value is the final validation loss."""
    from tptrain import environment, launch

    if not _is_job():
        return launch.start(typed(cfg), run_dir, environment.given_place())
    from tptrain.stop import Stopped
    from tptrain.sweep.pool import is_stopping
    from tptrain.sweep.results import job_result

    if is_stopping(_sweep_dir()):
        raise Stopped("not started")

    value = launch.start(typed(cfg), run_dir, environment.given_place(), apart=True)
    return job_result(0, [], run_dir).val_loss if value is None else value  # it was done before


def check(cfg: DictConfig, run_dir: Path) -> None:
    """Compare the layout with one process; `check.layouts=all`: every layout that fits."""
    from tptrain import environment

    if environment.given_place() is not None:
        raise ConfigError("tptrain check starts its own processes, but this is one of a launcher's: run it without torchrun")
    from tptrain import prove

    prove.check(typed(cfg), run_dir)


def doctor(cfg: DictConfig, run_dir: Path) -> None:
    """Examine the ranks of a layout and the links between them; also under a launcher."""
    from tptrain import environment
    from tptrain.consult import doctor as consult

    consult(typed(cfg), run_dir, environment.given_place())


def generate(cfg: DictConfig, run_dir: Path) -> None:
    """Write text with a run's model: `run=FOLDER prompt=TEXT`."""
    from tptrain import environment

    if environment.given_place() is not None:
        raise ConfigError("tptrain generate starts its own processes, but this is one of a launcher's: run it without torchrun")
    from tptrain import answer

    answer.generate(typed_as(GenerateConfig, cfg))


def evaluate(cfg: DictConfig, run_dir: Path) -> None:
    """Measure a run's model: loss, perplexity, accuracy on multiple-choice files: `run=FOLDER`."""
    from tptrain import environment

    if environment.given_place() is not None:
        raise ConfigError("tptrain eval starts its own processes, but this is one of a launcher's: run it without torchrun")
    from tptrain.examine.verb import examine

    examine(typed_as(EvalConfig, cfg))


def export(cfg: DictConfig, run_dir: Path) -> None:
    """Write a run's model as Hugging Face's transformers loads it: `run=FOLDER to=FOLDER`."""
    from tptrain import environment

    if environment.given_place() is not None:
        raise ConfigError("tptrain export is one process, but this is one of a launcher's: run it without torchrun")
    from tptrain.export import export as write

    write(typed_as(ExportConfig, cfg))


def slurm(cfg: DictConfig, run_dir: Path) -> None:
    """Write a script for sbatch that trains in the run folder, and submit it with slurm.submit=true."""
    from tptrain import environment

    if environment.given_place() is not None:
        raise ConfigError("tptrain slurm starts nothing, but this is one of a launcher's processes: run it by itself")
    from tptrain.slurm.write import write

    write(typed_as(SlurmConfig, cfg), run_dir, _config_flags(), _all_overrides())


def plan(cfg: DictConfig, run_dir: Path) -> None:
    """Print the stages of a config's pipeline, its bubble and its schedule; nothing is started."""
    from tptrain import environment

    if environment.given_place() is not None:
        raise ConfigError("tptrain plan starts nothing, but this is one of a launcher's processes: run it without torchrun")
    from tptrain.plan import show

    show.plan(resolve(typed(cfg)))


def data(cfg: DictConfig, run_dir: Path) -> None:
    """Prepare the data of a config without training, count it and show samples of it."""
    from tptrain import environment, interrupt

    if environment.given_place() is not None:
        raise ConfigError("tptrain data is one process, but this is one of a launcher's: run it without torchrun")
    config = resolve(typed(cfg))
    from tptrain.survey.show import survey

    with interrupt.signals_stop():
        survey(config, run_dir)


def plot(cfg: DictConfig, run_dir: Path) -> None:
    """Draw a run: `run=FOLDER`."""
    from tptrain import environment

    if environment.given_place() is not None:
        raise ConfigError("tptrain plot is one process, but this is one of a launcher's: run it without torchrun")
    from tptrain.plot import plot as draw

    draw(typed_as(PlotConfig, cfg))


_EVAL_TEXTS = {"run": "run", "to": "to", "choices": "choices", "delimiter": "delimiter", "checkpoint": "checkpoint.load"}
VERBS = {
    "train": Verb(train),
    "check": Verb(check),
    "data": Verb(data),
    "doctor": Verb(doctor),
    "generate": Verb(generate, "generate", GenerateConfig, {"prompt": "prompt", "checkpoint": "checkpoint.load"}, keeps=False),
    "export": Verb(export, "export", ExportConfig, {"run": "run", "to": "to", "checkpoint": "checkpoint.load"}, keeps=False),
    "eval": Verb(evaluate, "eval", EvalConfig, _EVAL_TEXTS, filled_in, keeps=False),
    "slurm": Verb(slurm, "slurm", SlurmConfig),
    "plan": Verb(plan, keeps=False),
    "plot": Verb(plot, "plot", PlotConfig, {"run": "run", "to": "to"}, keeps=False),
}


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
    verb = _take_verb(arguments)
    from tptrain import environment  # neither this nor Hydra imports torch

    verb = VERBS.get(environment.hide_verb(VERBS) or "", verb)
    place = environment.given_place()
    flags, overrides = _split(arguments)
    if not verb.keeps and _is_sweep(flags, overrides):
        raise ConfigError("-m starts one job after another, but this verb has no run folders to keep them in: leave -m out")
    overrides = [_as_text(override, verb.texts) for override in verb.fill_in(overrides)]
    if place is not None:
        _check_single_run(flags, overrides, place)
        environment.check_restarts(place, any(override.startswith("hydra.run.dir=") for override in overrides))
    if not verb.keeps or (place is not None and place.rank > 0) or _is_later_node(overrides):
        overrides = _without_folder(overrides)
    sys.argv[1:] = [*flags, *overrides]
    if place is None and verb.run is train and _is_sweep(flags, overrides):
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
        raise _unmakeable(error, overrides, _is_sweep(flags, overrides)) from error
    return 0


def compose(overrides: list[str], verb: str = "train") -> Any:
    """The config that the command line `overrides` asks for, typed and not yet resolved; for tests and benchmarks."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    _store_schemas(VERBS[verb])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose(VERBS[verb].config, [_as_text(override, VERBS[verb].texts) for override in VERBS[verb].fill_in(overrides)])
        return typed_as(VERBS[verb].schema, cfg)


def typed(cfg: DictConfig) -> Config:
    """The composed config of a training as an object; see `typed_as`."""
    return typed_as(Config, cfg)


def typed_as(schema: type[C], cfg: DictConfig) -> C:
    """The composed config as an object of the schema. Raises ConfigError for a key or a value that the schema has not."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from tptrain.refusal import explain

    _check_keys(OmegaConf.to_container(cfg), schema)
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise explain(error, _hydra_overrides(), schema) from error
    assert isinstance(config, schema)
    return config


# ---- arguments -------------------------------------------------------------------------------------------


def _take_verb(arguments: list[str]) -> Verb:
    """Remove the verb from the arguments. A first word that is neither an override nor a flag must be one."""
    first = arguments[0] if arguments else ""
    if not first or first[0] in "-~+" or "=" in first:
        return VERBS["train"]
    if first not in VERBS:
        near = difflib.get_close_matches(first, VERBS, n=1)
        raise ConfigError(f"{first} is an unknown verb: use {near[0] if near else ' or '.join(VERBS)}")
    return VERBS[arguments.pop(0)]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides, in whichever order they stood. Raises ConfigError."""
    from hydra._internal.utils import get_args_parser

    def error(message: str) -> NoReturn:
        raise ConfigError(f"{message}: see tptrain --hydra-help")

    parser = get_args_parser()
    parser.error = error  # type: ignore[method-assign]
    known, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        raise ConfigError(f"{unknown[0]} is an unknown flag: see tptrain --hydra-help")
    overrides = [*known.overrides, *rest]
    return [argument for argument in arguments if argument not in overrides], overrides


def _check_single_run(flags: list[str], overrides: list[str], place: Place) -> None:
    """Refuse a sweep inside ranks that somebody else started."""
    if _is_sweep(flags, overrides):
        raise ConfigError(
            f"-m starts one job after another, but this is rank {place.rank} of {place.world_size} that a launcher started for one run: "
            f"use tptrain -m {' '.join(overrides)}, without torchrun or srun"
        )


def _is_sweep(flags: list[str], overrides: list[str]) -> bool:
    """Whether the line asks for several jobs: by a flag, by the mode, or by a preset, `sweep=NAME`."""
    chosen = [override.lstrip("+").partition("=") for override in overrides]
    preset = any(key == "sweep" and value not in ("", "null") for key, _, value in chosen)
    return preset or bool({"-m", "--multirun"} & set(flags)) or "hydra.mode=multirun" in [override.lower() for override in overrides]


def _sweep_dir() -> Path:
    """The folder of the sweep of which this run is a job."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().sweep.dir)


def _is_job() -> bool:
    """Whether this run is a job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _is_later_node(overrides: list[str]) -> bool:
    """Whether this is the command of a node that takes node 0's run folder."""
    ranks = [override.partition("=")[2] for override in overrides if override.lstrip("+").startswith("launch.node_rank=")]
    return bool(ranks) and ranks[-1].isdecimal() and int(ranks[-1]) > 0


def _as_text(override: str, texts: Mapping[str, str]) -> str:
    """`word=TEXT` so that Hydra reads it as that text, whatever is in it, for a word of `texts`.

    What begins as a quoted text or as a list is left to Hydra.

    >>> print(_as_text("prompt=def f('a'", {"prompt": "prompt"}))
    prompt='def f(\\'a\\''
    """
    from tptrain.job import as_override

    word, equals, text = override.partition("=")
    if not equals or word not in texts:
        return override
    kept = text[:1] in ("", "'", '"', "[")
    return f"{texts[word]}={text}" if kept else as_override(texts[word], text)


def _without_folder(overrides: list[str]) -> list[str]:
    """The overrides of what makes no run folder: a verb that keeps none, a rank above 0, which takes rank 0's."""
    folder = {"hydra.run.dir": ".", "hydra.output_subdir": "null", "hydra/job_logging": "none", "hydra/hydra_logging": "none"}
    kept = [override for override in overrides if override.partition("=")[0] not in folder]
    return [*kept, *(f"{key}={value}" for key, value in folder.items())]


# ---- Hydra -----------------------------------------------------------------------------------------------


def _hydra_main(verb: Verb) -> Callable[[], Any]:
    """`hydra.main` around the verb."""
    import hydra
    from hydra.core.config_store import ConfigStore

    _store_schemas(verb)
    # Hydra copies the store, which is one object for the whole process, 95 times to write --help: 0.5 s.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us, and prints none itself

    def task(cfg: DictConfig) -> float | None:
        return _run_verb(verb, cfg)

    main_of: Callable[[], Any] = hydra.main(config_path=str(CONF), config_name=verb.config, version_base="1.3")(task)
    return main_of


def _store_schemas(verb: Verb) -> None:
    """Make the verbs' config classes the types of everything that Hydra composes; of a training's the verb's own extension, if any."""
    from hydra.core.config_store import ConfigStore

    from tptrain.job import schema

    ConfigStore.instance().store(name="schema", node=schema(verb.schema if issubclass(verb.schema, Config) else Config))
    ConfigStore.instance().store(name="generate_schema", node=schema(GenerateConfig))
    ConfigStore.instance().store(name="eval_schema", node=schema(EvalConfig))
    ConfigStore.instance().store(name="export_schema", node=schema(ExportConfig))
    ConfigStore.instance().store(name="plot_schema", node=schema(PlotConfig))


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
        if sweeping and verb.run is train and cfg.launch.nodes > 1:
            raise refuse("launch.nodes", cfg.launch.nodes, "cannot be with -m, which is one machine's", "start each job by itself")
        value = verb.run(cfg, run_dir)
        launch.end_of_task(failed=False)
        return value
    except ConfigError as error:
        launch.end_of_task(failed=True)
        _say(f"{job}{error}")
        if sweeping and verb.run is train:
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
            if verb.run is train:
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


def _hydra_overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    # Unresolved: an override may be the text "data.path=${model.name}".
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(overrides)


def _all_overrides() -> list[str]:
    """Those of the config, and Hydra's own that a job of its own can have."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    given: Any = OmegaConf.to_container(HydraConfig.get().overrides.hydra, resolve=False)
    of_the_sweep = ("hydra.mode=", "hydra.sweep.", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper")
    return [*_hydra_overrides(), *(override for override in given if not override.lstrip("+~").startswith(of_the_sweep))]


def _config_flags() -> list[str]:
    """`--config-dir FOLDER`, where that was given, with the folder's whole path."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    return [word for source in sources if source.provider == "command-line" for word in ("--config-dir", source.path)]


def _check_keys(values: Any, kind: Any, prefix: str = "", schema: Any = None) -> None:
    """Refuse keys that the schema has not: `+key=value` adds one, and OmegaConf would drop it in silence."""
    from typing import get_type_hints

    from tptrain.job import group_of
    from tptrain.refusal import unknown_key

    hints = {key: group_of(hint) for key, hint in get_type_hints(kind).items()}
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(prefix + key, value, schema or kind)
        if is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check_keys(value, hints[key], f"{prefix}{key}.", schema or kind)


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
