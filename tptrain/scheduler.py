"""Ranks that a cluster's scheduler has started: what its variables say about this process, under the names that torchrun gives them.

    srun -n 8 tptrain ...                 a task of a SLURM step                         SLURM_PROCID, SLURM_STEP_NUM_TASKS, ...
    -m hydra/launcher=submitit_slurm      the same: submitit starts its tasks by srun
    -m hydra/launcher=submitit_local      a task of a job of submitit's on this machine  SUBMITIT_LOCAL_GLOBALID, ...

A shell in an allocation has most of these variables as well (the script of `sbatch`, `salloc`, `srun --pty bash`), and is no rank: what
starts there starts its own. It is told by its step, which it has not or which has one task; SLURM_NTASKS counts the whole job's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tptrain.config_error import ConfigError

_FIRST_PORT, _PORTS = 12000, 18000
"""Below those that Linux hands out by itself."""


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process; empty where no scheduler has made it
    one of several tasks.

    Raises ConfigError for tasks that are not shared out evenly, in blocks.

    >>> slurm = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    >>> slurm |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[08-09]"}
    >>> " ".join(rank_variables(slurm).values())
    '3 4 1 2 gpu08 12217'
    """
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        tasks = int(environ.get("SUBMITIT_LOCAL_NTASKS", "1"))
        if tasks == 1:
            return {}
        rank, local_rank, job = (int(environ[f"SUBMITIT_LOCAL_{name}"]) for name in ("GLOBALID", "LOCALID", "JOB_ID"))
        return _variables(rank, tasks, local_rank, tasks, "127.0.0.1", _port(job, 0))
    if "SLURM_STEP_ID" not in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    tasks, rank, local_rank, node = (int(environ[f"SLURM_{name}"]) for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID", "NODEID"))
    each = environ["SLURM_STEP_TASKS_PER_NODE"]
    even = re.fullmatch(r"(\d+)(\(x\d+\))?", each)
    if even is None:
        raise ConfigError(f"srun started {each} tasks on its nodes, but each needs as many: use srun --ntasks-per-node")
    if rank != node * int(even[1]) + local_rank:
        raise ConfigError(
            f"srun shared the tasks out in turn, so that task {rank} is on node {node}, but ranks of a tp group are neighbours: "
            "use srun --distribution=block"
        )
    port = _port(int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"]))
    return _variables(rank, tasks, local_rank, int(even[1]), first_host(environ["SLURM_STEP_NODELIST"]), port)


def _variables(rank: int, tasks: int, local_rank: int, local_tasks: int, host: str, port: int) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, map(str, (rank, tasks, local_rank, local_tasks, host, port)), strict=True))


def _port(job: int, step: int) -> int:
    """Where the tasks of a step meet: steps that run side by side on a machine have different ones."""
    return _FIRST_PORT + (job * 31 + step) % _PORTS


def first_host(nodes: str) -> str:
    """The first of a list of hosts as SLURM writes it.

    >>> first_host("gpu[08-11,15],login"), first_host("r[1-2]n[3,5]"), first_host("a,b")
    ('gpu08', 'r1n3', 'a')
    """
    plain = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes)
    return plain.split(",")[0]


def has_own_gpu(environ: Mapping[str, str]) -> bool:
    """Whether SLURM shows each task one GPU of its own only, which then is number 0 to each of them.

    >>> has_own_gpu({"SLURM_GPUS_PER_TASK": "1"}), has_own_gpu({"SLURM_GPUS_ON_NODE": "8"})
    (True, False)
    """
    bound = f"{environ.get('SLURM_GPU_BIND', '')} {environ.get('SLURM_TRES_BIND', '')}"
    return environ.get("SLURM_GPUS_PER_TASK", "").split(":")[-1] == "1" or bool(re.search(r"(single|per_task):1\b", bound))


def submitit_signal(environ: Mapping[str, str]) -> str | None:
    """The signal by which submitit tells a job that it has to stop, and is told that it may be queued again; None in a job of nobody's.

    >>> submitit_signal({"SUBMITIT_EXECUTOR": "slurm"})
    'SIGUSR2'
    """
    return f"SIG{environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}" if "SUBMITIT_EXECUTOR" in environ else None
