"""The text of a script for sbatch: what it asks for, the ranks by srun, and that the job is queued again once it has stopped and saved.

    srun ends with 75     all ranks have stopped on a signal or a time limit, and saved
                  138     128 + SIGUSR1: the signal came before the training listened, so there is nothing to save
    squeue says RUNNING   the job goes on existing; after scancel it is COMPLETING, and must not come back

SIGUSR1 goes to the ranks alone, SIGTERM (scancel, the time limit) to the script's shell as well, which must outlive them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tptrain.config import refuse
from tptrain.slurm.options import SlurmOptions


@dataclass(frozen=True)
class Batch:
    """What a script is written from."""

    title: str
    """What will run, in a few words."""
    name: str
    """The job's."""
    options: SlurmOptions
    tasks_per_node: int
    run_dir: Path
    """Absolute."""
    working_dir: Path
    """From where paths in `arguments` are read; absolute."""
    command: str
    """What starts tptrain, as the shell reads it."""
    arguments: Sequence[str]
    """Those of tptrain."""


def script(batch: Batch) -> str:
    """The script. Raises ConfigError for what one of its lines cannot hold."""
    options = batch.options
    lines = ["#!/bin/bash", f"# {_one_line(batch.title)}"]
    lines += [f"#SBATCH {option}" for option in _options(batch)]
    if options.requeue:
        lines += ["", "trap : TERM USR1  # this shell stays until the ranks have saved"]
    lines += ["", *options.setup] if options.setup else []
    start = ["srun", "--kill-on-bad-exit=1", "--distribution=block"]
    start += [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []
    start += options.srun
    lines += ["", "export PYTHONUNBUFFERED=1", f"{' '.join(start)} {batch.command} \\"]
    lines += [f"  {shlex.quote(argument)} \\" for argument in batch.arguments[:-1]]
    lines += [f"  {shlex.quote(batch.arguments[-1])}", "code=$?"]
    if options.requeue:
        lines += [
            "",
            "# 75: stopped and saved. 138: stopped by SIGUSR1 before the training began. RUNNING: nobody has cancelled the job.",
            'if [[ $code == 75 || $code == 138 ]] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
            '  echo "tptrain: queued again"',
            "  trap - TERM",
            '  scontrol requeue "$SLURM_JOB_ID" && sleep 300',
            "fi",
        ]
    return "\n".join([*lines, "exit $code", ""])


def _options(batch: Batch) -> list[str]:
    """Those of sbatch, one a line."""
    options = batch.options
    log = str(batch.run_dir / "slurm-").replace("%", "%%") + "%j.log"
    asked = {
        "job-name": batch.name,
        "nodes": options.nodes,
        "ntasks-per-node": batch.tasks_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "chdir": batch.working_dir,
        "output": log,
        "open-mode": "append",
        "signal": f"USR1@{options.signal_seconds}",
    }
    found = [f"--{name}={_quoted(str(value))}" for name, value in asked.items() if value is not None]
    found.append("--requeue" if options.requeue else "--no-requeue")
    return [*found, *(_one_line(line).removeprefix("#SBATCH ") for line in options.sbatch)]


def _quoted(text: str) -> str:
    """As sbatch reads a value: plain, or in double quotes, in which a backslash keeps the next character."""
    if "\n" in text:
        raise refuse("hydra.run.dir", text, "has a line break, which a line of #SBATCH cannot hold", "use another folder")
    plain = shlex.quote(text) == text
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one_line(text: str) -> str:
    return " ".join(text.split())
