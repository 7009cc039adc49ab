"""`tptrain slurm`: check the config for the processes that SLURM will start, write the script into the run folder, and submit it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tptrain.config import Config, ConfigError, refuse, resolve
from tptrain.files import write_atomically
from tptrain.job import as_override
from tptrain.plan.pipeline import schedule_of
from tptrain.slurm.options import SlurmConfig, tasks_per_node
from tptrain.slurm.script import Batch, script

NAME = "job.sbatch"
"""The script's file in the run folder."""


def write(config: SlurmConfig, run_dir: Path, flags: Sequence[str], overrides: Sequence[str]) -> None:
    """Write the script that trains `config` in `run_dir`, print where it is, and submit it where slurm.submit asks for that.

    config: typed, not yet resolved. flags: those of Hydra's that the training needs too. overrides: all that were given; those of
    slurm and the run folder are left out. Raises ConfigError before anything is written, where that many processes cannot train it.
    """
    each = tasks_per_node(config)
    resolved = resolve(config, config.slurm.nodes * each, None, each)
    schedule_of(resolved)
    if config.slurm.submit and shutil.which("sbatch") is None:
        raise refuse("slurm.submit", True, "needs sbatch, which is not on this machine", "use slurm.submit=false, and submit elsewhere")
    run_dir = run_dir.absolute()
    kept = [override for override in overrides if not override.lstrip("+~").startswith(("slurm.", "slurm=", "hydra.run.dir="))]
    batch = Batch(
        f"{_title(resolved)} on {config.slurm.nodes} node{'s' * (config.slurm.nodes > 1)}. Submit with: sbatch {NAME}",
        _name(resolved),
        config.slurm,
        each,
        run_dir,
        Path.cwd(),
        config.slurm.command or f"{shlex.quote(sys.executable)} -m tptrain",
        [*flags, *kept, as_override("hydra.run.dir", str(run_dir))],
    )
    path = run_dir / NAME
    write_atomically(path, script(batch).encode())
    print(f"script: {path}")
    if config.slurm.submit:
        print(f"job: {_submit(path)}")
    else:
        print(f"submit it with: sbatch {shlex.quote(str(path))}")


def _submit(path: Path) -> str:
    """Submit the script. Returns the job's id. Raises ConfigError with sbatch's own words where it refuses."""
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refuses {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def _title(config: Config) -> str:
    parallel = config.parallel
    return f"{config.model.name}, tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp} = {config.processes} processes"


def _name(config: Config) -> str:
    parallel = config.parallel
    return f"{config.model.name}-tp{parallel.tp}_pp{parallel.pp}_dp{parallel.dp}"
