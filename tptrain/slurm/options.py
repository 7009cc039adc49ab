"""The schema of the verb `slurm`: a training's config, and the group that says what to ask SLURM for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tptrain.config import Config, refuse


@dataclass
class SlurmOptions:
    """What `tptrain slurm` asks SLURM for. Null leaves an option out, so that the cluster's default holds."""

    nodes: int
    """Machines."""
    tasks_per_node: int | str
    """Ranks on each, or auto: gpus_per_node, without GPUs the layout's processes shared evenly."""
    gpus_per_node: int | None
    """GPUs of each."""
    cpus_per_task: int | None
    """CPU cores for each rank."""
    partition: str | None
    """Partition to submit to."""
    account: str | None
    """Account that is charged."""
    time: str | None
    """Time limit as SLURM reads it: minutes, HH:MM:SS or D-HH:MM:SS."""
    signal_seconds: int
    """How long before the time limit SIGUSR1 asks the ranks to save and stop; SLURM may send it up to 60 s earlier."""
    requeue: bool
    """Queue the job again when it has stopped and saved: at the time limit, for a job of higher priority."""
    submit: bool
    """Submit the script, too."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the script runs before the ranks start, such as `module load cuda`."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, as in --qos=long."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, as in --container-image=FILE."""
    command: str | None = None
    """What starts tptrain on the nodes, as in `apptainer exec --nv image.sif tptrain`; null: this Python and package."""


@dataclass
class SlurmConfig(Config):
    """A training, and what to ask SLURM for."""

    slurm: SlurmOptions = field(default_factory=lambda: SlurmOptions(1, "auto", None, None, None, None, None, 120, True, False))


def tasks_per_node(config: SlurmConfig) -> int:
    """The ranks on each node. config: typed, not yet resolved. Raises ConfigError."""
    slurm, parallel = config.slurm, config.parallel
    for key in ("nodes", "gpus_per_node", "cpus_per_task", "signal_seconds"):
        value = getattr(slurm, key)
        if value is not None and value < 1:
            raise refuse(f"slurm.{key}", value, "is below 1", "use 1 or more")
    if slurm.signal_seconds > 65535:
        raise refuse("slurm.signal_seconds", slurm.signal_seconds, "is above 65535, SLURM's largest", "use less")
    if slurm.time is not None and not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", slurm.time):
        raise refuse("slurm.time", slurm.time, "is no time that SLURM reads", "use minutes, HH:MM:SS or D-HH:MM:SS")
    each = slurm.tasks_per_node
    if each != "auto":
        if not isinstance(each, int) or each < 1:
            raise refuse("slurm.tasks_per_node", each, "is neither auto nor a positive integer", "use auto, 1, 2, ...")
        return each
    if slurm.gpus_per_node is not None:
        return slurm.gpus_per_node
    dp = 1 if parallel.dp == "auto" else int(parallel.dp)
    processes = parallel.tp * parallel.pp * dp
    if processes % slurm.nodes:
        rule = f"does not divide tp {parallel.tp} x pp {parallel.pp} x dp {dp} = {processes} processes"
        raise refuse("slurm.nodes", slurm.nodes, rule, "use slurm.tasks_per_node=NUMBER, or another layout")
    return processes // slurm.nodes
