"""Training in a real SLURM: two nodes on this machine, which `tests/slurm/cluster.sh` starts and stops."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import Outcome, command, environment, finish, start, wait_until
from tests.support import SMALL
from tptrain import scheduler
from tptrain.cli import compose
from tptrain.config import ConfigError
from tptrain.monitor.metrics import read_metrics
from tptrain.slurm.options import SlurmConfig
from tptrain.slurm.write import write

HERE = Path(__file__).parent / "slurm"
PYTHONPATH = f"{HERE / 'pace'}:{Path.cwd()}"
STEPS = 8
TRAINING = [*SMALL, f"train.max_steps={STEPS}", "train.eval_every=4", "checkpoint.every=3"]
SECONDS = 300
"""More than any job here takes, also on a machine that is 10 times slower."""


# ---- what SLURM's variables say -------------------------------------------------------------------------

SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASK = {
    **SHELL, "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "a[1-2]"
}  # fmt: skip


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SHELL,  # the script of sbatch, or salloc's shell
        {**TASK, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell as an interactive step, srun --pty
        {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "1"},
    ],
)
def test_a_shell_in_an_allocation_is_no_rank(variables: dict[str, str]) -> None:
    assert scheduler.rank_variables(variables) == {}


def test_tasks_are_ranks_in_blocks() -> None:
    found = [
        scheduler.rank_variables({**TASK, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank // 2), "SLURM_LOCALID": str(rank % 2)})
        for rank in range(4)
    ]
    assert [(each["RANK"], each["WORLD_SIZE"], each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) for each in found] == [
        ("0", "4", "0", "2"), ("1", "4", "1", "2"), ("2", "4", "0", "2"), ("3", "4", "1", "2")
    ]  # fmt: skip
    assert {each["MASTER_ADDR"] for each in found} == {"a1"}
    assert len({each["MASTER_PORT"] for each in found}) == 1
    assert scheduler.rank_variables({**TASK, "SLURM_STEP_ID": "3"})["MASTER_PORT"] != found[0]["MASTER_PORT"]


def test_tasks_that_are_not_in_even_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="--distribution=block"):
        scheduler.rank_variables({**TASK, "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"})
    with pytest.raises(ConfigError, match="started 3,1 tasks on its nodes"):
        scheduler.rank_variables({**TASK, "SLURM_STEP_TASKS_PER_NODE": "3,1"})


# ---- the script -------------------------------------------------------------------------------------------


def _write(run_dir: Path, *overrides: str) -> str:
    """The script of a command line."""
    config = compose(list(overrides), "slurm")
    assert isinstance(config, SlurmConfig)
    run_dir.mkdir()
    write(config, run_dir, [], overrides)
    return (run_dir / "job.sbatch").read_text()


def test_the_script_asks_for_what_was_asked(tmp_path: Path) -> None:
    text = _write(
        tmp_path / "run", "model=gpt_1b", "parallel=tp8_pp4", "slurm.nodes=4", "slurm.gpus_per_node=8", "slurm.time=1-12:00:00",
        "slurm.partition=gpu", "slurm.cpus_per_task=12", "slurm.setup=[module load cuda]", 'slurm.sbatch=["--qos=long"]',
        'slurm.srun=["--mpi=none"]',
        "slurm.command=apptainer run a.sif tptrain", "slurm.signal_seconds=300", "train.max_steps=9",
    )  # fmt: skip
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--partition=gpu", "--time=1-12:00:00", "--qos=long",
        "--signal=USR1@300", "--open-mode=append", "--requeue",
    }  # fmt: skip
    assert not any(line.startswith("--account") for line in asked)
    assert "module load cuda\n" in text
    assert (
        " --cpus-per-task=12 --mpi=none apptainer run a.sif tptrain \\\n  model=gpt_1b \\\n  parallel=tp8_pp4 \\\n  train.max_steps=9 \\\n"
        in text
    )
    assert "slurm." not in text.split("srun ")[1]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert 'requeue "$' not in _write(tmp_path / "once", "slurm.requeue=false")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel=tp8_pp4", "slurm.nodes=2", "slurm.gpus_per_node=8"], "parallel.dp=1 gives tp 8 x pp 4 x dp 1 = 32 processes, but 16"),
        (["parallel=tp2", "slurm.nodes=2", "slurm.tasks_per_node=1"], "parallel.tp=2 does not divide the 1 process of a node"),
        (["parallel=tp2", "slurm.nodes=3"], "slurm.nodes=3 does not divide tp 2 x pp 1 x dp 1 = 2 processes"),
        (["parallel=tp2", "slurm.tasks_per_node=2", "slurm.time=soon"], "slurm.time=soon is no time that SLURM reads"),
        (["slurm.signal_seconds=0"], "slurm.signal_seconds=0 is below 1"),
        (["slurm.nodes=0"], "slurm.nodes=0 is below 1"),
        (["slurm.tasks_per_node=many"], "slurm.tasks_per_node=many is neither auto nor a positive integer"),
        (["slurm.nods=2"], "slurm.nods=2 is an unknown key: use slurm.nodes"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_a_script_is_written(overrides: list[str], said: str, tmp_path: Path) -> None:
    if "nods" in said:
        outcome = command(tmp_path, "slurm", *overrides, "hydra.run.dir=run")
        assert (outcome.code, outcome.out) == (2, "")
        assert said in outcome.err
    else:
        with pytest.raises(ConfigError, match=said):
            _write(tmp_path / "run", *overrides)
    assert not list(tmp_path.rglob("job.sbatch"))


# ---- with SLURM -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A running cluster, to which SLURM_CONF points."""
    script = str(HERE / "cluster.sh")
    installed = subprocess.run([script, "install"], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"no SLURM on this machine: {installed.stderr.strip().splitlines()[-1]}")
    folder, before = tempfile.mkdtemp(prefix="slurm", dir="/tmp"), os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
    try:
        started = subprocess.run([script, "start", folder, str(_free_ports())], capture_output=True, text=True, check=False)
        assert started.returncode == 0, started.stderr
        yield
    finally:
        subprocess.run([script, "stop", folder], check=False)
        left = [line for line in _command_lines() if folder in line]
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left


def _free_ports() -> int:
    """The first of three neighbouring free ports, below those that Linux hands out."""
    for first in range(27800, 30000, 3):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


def _command_lines() -> list[str]:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What one process measures."""
    folder = tmp_path_factory.mktemp("one")
    outcome = command(folder, *TRAINING, "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    return _measured(folder / "run")


def _measured(run_dir: Path) -> list[dict]:
    keys = ("step", "loss", "grad_norm", "val_loss")
    return [{key: record[key] for key in keys if key in record} for record in read_metrics(run_dir)]


def _assert_close(found: list[dict], expected: list[dict]) -> None:
    assert [list(each) for each in found] == [list(each) for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=2e-5)


def _status(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / "status.json").read_text())
    except OSError:
        return {}


def _srun(folder: Path, tasks: int, *arguments: str, **variables: str) -> Outcome:
    """`srun tptrain`, on both nodes."""
    line = ["srun", "-N2", f"--ntasks-per-node={tasks // 2}", sys.executable, "-m", "tptrain", *arguments]
    process = subprocess.Popen(
        line, cwd=folder, env=environment(PYTHONPATH=PYTHONPATH, **variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return finish(process, SECONDS)


def _submit(run_dir: Path, *arguments: str, **variables: str) -> str:
    """`tptrain slurm ... slurm.submit=true`; the job's id."""
    where = f"hydra.run.dir={json.dumps(str(run_dir))}"
    outcome = command(
        run_dir.parent,
        "slurm",
        *TRAINING,
        where,
        "slurm.submit=true",
        "slurm.signal_seconds=5",
        *arguments,
        PYTHONPATH=PYTHONPATH,
        **variables,
    )
    assert outcome.code == 0, outcome.err
    return outcome.out.split("job: ")[1].strip()


def _state(job: str) -> str:
    """A job's state in SLURM."""
    shown = subprocess.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], capture_output=True, text=True, check=True)
    return shown.stdout.strip()


def _wait_for_state(job: str, *states: str) -> None:
    wait_until(lambda: _state(job) in states, SECONDS)


def _log(run_dir: Path) -> str:
    return "".join(path.read_text() for path in run_dir.glob("slurm-*.log"))


@pytest.mark.usefixtures("cluster")
def test_four_tasks_of_srun_measure_what_one_process_does(one_process: list[dict], tmp_path: Path) -> None:
    outcome = _srun(tmp_path, 4, *TRAINING, "parallel=tp2_pp2")
    assert outcome.code == 0, outcome.err
    (run_dir,) = (path.parent for path in (tmp_path / "outputs").glob("*/*/metrics.jsonl"))
    assert len(list((tmp_path / "outputs").glob("*/*/.hydra"))) == 1, "rank 0's"
    _assert_close(_measured(run_dir), one_process)
    assert sorted(path.name for path in run_dir.glob("logs/*.log")) == [f"rank-{rank}.log" for rank in range(4)]
    assert outcome.out.count("run folder") == 2, "rank 0 alone speaks: at the begin and at the end"


@pytest.mark.usefixtures("cluster")
def test_a_signal_saves_and_the_job_goes_on_by_itself(one_process: list[dict], tmp_path: Path) -> None:
    """The script, SIGUSR1, the queue, the same folder and W&B run; and the job that takes the nodes away does the same."""
    signalled, preempted = tmp_path / "it's 100%j odd", tmp_path / "preempted"
    layout = ("parallel=pp2", "slurm.nodes=2", "slurm.tasks_per_node=1")
    jobs = {
        signalled: _submit(signalled, *layout, "wandb=offline", SLOW="odd"),
        preempted: _submit(preempted, *layout, "slurm.partition=low", SLOW="preempted"),
    }
    wait_until(lambda: all((_status(run_dir).get("step") or 0) >= 3 for run_dir in jobs), SECONDS)
    first_id = (signalled / "wandb_id").read_text()
    subprocess.run(["scancel", "--signal=USR1", jobs[signalled]], check=True)
    high = subprocess.run(
        ["sbatch", "--parsable", "-p", "high", "-N2", "--ntasks-per-node=8", "-o", "/dev/null", "--wrap", "true"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    for run_dir, job in jobs.items():
        wait_until(lambda run_dir=run_dir: "queued again" in _log(run_dir), SECONDS)
        _wait_for_state(job, "COMPLETED", "FAILED")
        assert _state(job) == "COMPLETED", _log(run_dir)
        assert _log(run_dir).count("stopped by SIGUSR1 after step") == 1, "the log of both starts is one"
        _assert_close(_measured(run_dir), one_process)
        assert _status(run_dir)["state"] == "done"
    assert _state(high) == "COMPLETED"
    assert (signalled / "wandb_id").read_text() == first_id


@pytest.mark.usefixtures("cluster")
def test_a_failed_task_ends_the_job_with_its_cause(tmp_path: Path) -> None:
    """The first and another, by our script; and without srun's -K, by which our script has SLURM end the others."""
    layout = ("parallel=pp2", "slurm.nodes=2", "slurm.tasks_per_node=1", "train.max_steps=1000", "launch.timeout_seconds=600")
    jobs = {tmp_path / f"raise{task}": _submit(tmp_path / f"raise{task}", *layout, RAISE=f"{task} {task}") for task in (0, 1)}
    outcome = _srun(tmp_path, 2, *TRAINING, "parallel=pp2", "hydra.run.dir=plain", "launch.timeout_seconds=600", RAISE="1 plain")
    assert outcome.code == 1
    assert "rank 1 failed:\nTraceback" in outcome.err
    assert _status(tmp_path / "plain") == {**_status(tmp_path / "plain"), "state": "failed", "error": "rank 1: RuntimeError: planted"}
    for task, (run_dir, job) in enumerate(jobs.items()):
        _wait_for_state(job, "COMPLETED", "FAILED")
        assert _state(job) == "FAILED"
        assert f"rank {task} failed:\nTraceback" in _log(run_dir)
        assert "RuntimeError: planted" in _log(run_dir)
        assert "queued again" not in _log(run_dir)


@pytest.mark.usefixtures("cluster")
def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = _submit(run_dir, "parallel=pp2", "slurm.nodes=2", "slurm.tasks_per_node=1", "train.max_steps=1000", SLOW="run")
    wait_until(lambda: (_status(run_dir).get("step") or 0) >= 3, SECONDS)
    subprocess.run(["scancel", job], check=True)
    _wait_for_state(job, "CANCELLED")
    assert "queued again" not in _log(run_dir)


@pytest.mark.usefixtures("cluster")
def test_a_sweep_by_submitit(tmp_path: Path) -> None:
    """Three jobs of two tasks each train, the first of them in two starts; a fourth, whose second task fails, fails by itself."""
    sweep = tmp_path / "sweep"
    process = start(
        tmp_path, "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.sweep.dir=sweep", *TRAINING,
        "parallel=tp2", "optimizer.lr=1e-3,2e-3,3e-3,4e-3", PYTHONPATH=PYTHONPATH, RAISE="1 /3", SLOW="/0",
    )  # fmt: skip
    wait_until(lambda: (_status(sweep / "0").get("step") or 0) >= 3, SECONDS)
    (first,) = (path.name for path in (sweep / ".submitit").glob("*_0"))
    subprocess.run(["scancel", "--signal=USR2", first], check=True)
    outcome = finish(process, SECONDS)
    assert outcome.code == 1, outcome.err
    folders = [sweep / str(job) for job in range(4)]
    assert [_status(folder)["state"] for folder in folders] == ["done", "done", "done", "failed"]
    assert "planted" in _status(folders[3])["error"]
    assert [record["step"] for record in read_metrics(folders[0]) if "loss" in record] == list(range(1, STEPS + 1))
    losses = [read_metrics(folder)[-1]["val_loss"] for folder in folders[:3]]
    assert len({*losses}) == 3, "each with its own learning rate"
    for folder in folders:
        assert sorted(path.name for path in folder.glob("logs/*.log")) == ["rank-0.log", "rank-1.log"]
    told = "".join(path.read_text() for path in (sweep / ".submitit" / first).glob("*_0_log.out"))
    assert "this job is preempted" in told or "this job is timed-out" in told
    assert (folders[0] / "checkpoints/latest").exists()
