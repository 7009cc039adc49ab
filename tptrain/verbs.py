"""The verbs of the command: what `tptrain VERB` composes and what it calls. Nothing here imports torch before a verb runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.config import Config, resolve
from tptrain.eval_config import EvalConfig
from tptrain.export_config import ExportConfig
from tptrain.generate_config import GenerateConfig
from tptrain.own_data import filled_in
from tptrain.plot_config import PlotConfig
from tptrain.slurm.options import SlurmConfig
from tptrain.typed_config import all_overrides, config_flags, hydra_overrides, is_job, sweep_dir, typed, typed_as

if TYPE_CHECKING:
    from omegaconf import DictConfig


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
    alone: str | None = None
    """Why it is no work for the ranks of a launcher; None: they may do it."""


def train(cfg: DictConfig, run_dir: Path) -> float | None:
    """Train a model; in the same run folder again: resume. The value is the final validation loss."""
    from tptrain import environment, launch

    if not is_job():
        return launch.start(typed(cfg), run_dir, environment.given_place())
    from tptrain.stop import Stopped
    from tptrain.sweep.pool import is_stopping
    from tptrain.sweep.results import job_result

    if is_stopping(sweep_dir()):
        raise Stopped("not started")

    value = launch.start(typed(cfg), run_dir, environment.given_place(), apart=True)
    return job_result(0, [], run_dir).val_loss if value is None else value  # it was done before


def check(cfg: DictConfig, run_dir: Path) -> None:
    """Compare the layout with one process; `check.layouts=all`: every layout that fits."""
    from tptrain import prove

    prove.check(typed(cfg), run_dir)


def doctor(cfg: DictConfig, run_dir: Path) -> None:
    """Examine the ranks of a layout and the links between them; also under a launcher."""
    from tptrain import environment
    from tptrain.consult import doctor as consult

    consult(typed(cfg), run_dir, environment.given_place())


def generate(cfg: DictConfig, run_dir: Path) -> None:
    """Write text with a run's model: `run=FOLDER prompt=TEXT`."""
    from tptrain import answer

    answer.generate(typed_as(GenerateConfig, cfg))


def evaluate(cfg: DictConfig, run_dir: Path) -> None:
    """Measure a run's model: loss, perplexity, accuracy on multiple-choice files: `run=FOLDER`."""
    from tptrain.examine.verb import examine

    examine(typed_as(EvalConfig, cfg))


def export(cfg: DictConfig, run_dir: Path) -> None:
    """Write a run's model as Hugging Face's transformers loads it: `run=FOLDER to=FOLDER`."""
    from tptrain.export import export as write

    write(typed_as(ExportConfig, cfg))


def slurm(cfg: DictConfig, run_dir: Path) -> None:
    """Write a script for sbatch that trains in the run folder, and submit it with slurm.submit=true."""
    from tptrain.slurm.write import write

    write(typed_as(SlurmConfig, cfg), run_dir, config_flags(), all_overrides())


def plan(cfg: DictConfig, run_dir: Path) -> None:
    """Work out memory, traffic and time of a layout, or find the best of all layouts of hardware.devices; nothing is trained."""
    from tptrain.foresee import plan as foresee

    foresee(typed(cfg), run_dir, hydra_overrides())


def data(cfg: DictConfig, run_dir: Path) -> None:
    """Prepare the data of a config without training, count it and show samples of it."""
    from tptrain import interrupt

    config = resolve(typed(cfg))
    from tptrain.survey.show import survey

    with interrupt.signals_stop():
        survey(config, run_dir)


def plot(cfg: DictConfig, run_dir: Path) -> None:
    """Draw a run: `run=FOLDER`."""
    from tptrain.plot import plot as draw

    draw(typed_as(PlotConfig, cfg))


_STARTS, _ONE, _NONE = "starts its own processes", "is one process", "starts nothing"
_EVAL_TEXTS = {"run": "run", "to": "to", "choices": "choices", "delimiter": "delimiter", "checkpoint": "checkpoint.load"}
VERBS = {
    "train": Verb(train),
    "check": Verb(check, alone=_STARTS),
    "data": Verb(data, alone=_ONE),
    "doctor": Verb(doctor),
    "generate": Verb(
        generate, "generate", GenerateConfig, {"prompt": "prompt", "checkpoint": "checkpoint.load"}, keeps=False, alone=_STARTS
    ),
    "export": Verb(export, "export", ExportConfig, {"run": "run", "to": "to", "checkpoint": "checkpoint.load"}, keeps=False, alone=_ONE),
    "eval": Verb(evaluate, "eval", EvalConfig, _EVAL_TEXTS, filled_in, keeps=False, alone=_STARTS),
    "slurm": Verb(slurm, "slurm", SlurmConfig, alone=_NONE),
    "plan": Verb(plan, "plan", alone=_NONE),
    "plot": Verb(plot, "plot", PlotConfig, {"run": "run", "to": "to"}, keeps=False, alone=_ONE),
}
