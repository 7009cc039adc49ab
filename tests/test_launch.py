"""Starting ranks, and how a job ends when one of them fails or a signal comes. Training is the stand-in of `tests/faults`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.command import FAULTS, Outcome, command, finish, processes_of, start, wait_until
from tests.support import small_config
from tptrain import environment, failures, launch, ranks
from tptrain.config import ConfigError
from tptrain.data.lock import locked
from tptrain.failures import Failure
from tptrain.job import Job, Place
from tptrain.pipeline.notation import dumps
from tptrain.pipeline.schedules import one_forward_one_backward

TINY = ("experiment=memorize", "wandb=disabled", "hydra.run.dir=run", "launch.timeout_seconds=600")


@pytest.fixture
def run_dir(tmp_path: Path):
    yield tmp_path / "run"
    assert processes_of(tmp_path) == []


def _train(run_dir: Path, *arguments: str, steps: int = 10, fault: str = "", torchrun: int = 0) -> Outcome:
    arguments = (*TINY, f"train.max_steps={steps}", *arguments)
    return command(run_dir.parent, *arguments, torchrun=torchrun, PYTHONPATH=str(FAULTS), FAULT=fault)


def _ranks(run_dir: Path) -> list[str]:
    """For each rank of the run, its process and its environment, in one line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = (folder / "cmdline").read_bytes().decode(), (folder / "environ").read_bytes().decode()
        except OSError:
            continue
        if str(run_dir) in line and "tptrain.launch" in line:
            found.append(f"{folder.name} {variables.replace(chr(0), ' ')}")
    return found


def _start(run_dir: Path, *arguments: str, fault: str = "", until: int = 7):
    """A long run, once its ranks are in the middle of training."""
    process = start(run_dir.parent, *TINY, "train.max_steps=5000", *arguments, PYTHONPATH=str(FAULTS), FAULT=fault)
    wait_until(lambda: (_status(run_dir).get("step") or 0) >= until)
    return process


def _status(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / "status.json").read_text())
    except OSError:
        return {}


def _log(run_dir: Path, rank: int) -> str:
    return (run_dir / "logs" / f"rank-{rank}.log").read_text()


# ---- a job that goes well --------------------------------------------------------------------------------


def test_two_ranks_train_and_leave_logs_and_config(run_dir: Path):
    outcome = _train(run_dir, "parallel=tp2", "launch.threads_per_rank=3")
    assert (outcome.code, outcome.err) == (0, "")
    assert "rank 0 of 2, 3 threads, OMP 3" in outcome.out
    assert "rank 1" not in outcome.out
    assert "rank 1 of 2, 3 threads, OMP 3" in _log(run_dir, 1)
    assert f"flights in {run_dir}/logs/flight-nccl-" in _log(run_dir, 1), "where NCCL's recorder is to write; it has no GPU here"
    assert (run_dir / "logs" / "rank-0.log").exists()
    assert _status(run_dir) == {"state": "done", "step": 10, "error": None}
    config = Job.load("train", run_dir, run_dir).config
    assert (config.parallel.tp, config.parallel.dp, config.hardware.device) == (2, 1, "cpu")


def test_torchrun_ranks_share_one_run_folder(run_dir: Path):
    outcome = _train(run_dir, "parallel=tp2", torchrun=2)
    assert outcome.code == 0
    assert "rank 0 of 2" in outcome.out
    assert "rank 1 of 2" in _log(run_dir, 1)
    assert f"flights in {run_dir}/logs/flight-nccl-" in _log(run_dir, 1)
    assert _status(run_dir)["state"] == "done"
    assert sorted(path.name for path in run_dir.parent.iterdir()) == ["outputs", "run"]
    assert [path.name for path in (run_dir.parent / "outputs").iterdir()] == ["token_stores"]


def test_torchrun_ranks_wait_for_the_data_longer_than_for_each_other(run_dir: Path):
    """Another process builds the token store meanwhile, so that rank 0 waits for it, and the other ranks for rank 0."""
    assert _train(run_dir).code == 0
    (store,) = (run_dir.parent / "outputs" / "token_stores").glob("memorize-*")
    shutil.rmtree(store)
    with locked(store.with_name(f".{store.name}.lock"), lambda: None):
        process = start(
            run_dir.parent, *TINY, "parallel=tp2", "train.max_steps=10", "launch.timeout_seconds=4", torchrun=2,
            PYTHONPATH=str(FAULTS), PYTHONUNBUFFERED="1",
        )  # fmt: skip
        assert process.stdout is not None
        assert any("waiting for another process" in line for line in process.stdout)
        time.sleep(6)  # longer than the limit
        assert process.poll() is None
    outcome = finish(process)
    assert outcome.code == 0, outcome.err
    assert "rank 0 of 2" in outcome.out


# ---- a rank that fails -----------------------------------------------------------------------------------


def test_a_raising_rank_ends_the_job_and_its_traceback_comes_first(run_dir: Path):
    outcome = _train(run_dir, "parallel=tp2", steps=5000, fault="raise:1")
    assert outcome.code == 1
    assert outcome.seconds < 200  # far from launch.timeout_seconds
    assert outcome.err.startswith("rank 1 failed:\nTraceback")
    assert outcome.err.endswith("RuntimeError: planted\nits log: run/logs/rank-1.log\n")
    assert "peer" not in outcome.err + outcome.out
    assert _status(run_dir)["state"] == "failed"
    assert _status(run_dir)["error"] == "rank 1: RuntimeError: planted"
    assert "RuntimeError: planted" in _log(run_dir, 1)


def test_a_killed_rank_is_named_with_its_signal(run_dir: Path):
    outcome = _train(run_dir, "parallel=tp2", steps=5000, fault="kill:1")
    assert outcome.code == 1
    assert outcome.seconds < 200  # far from launch.timeout_seconds
    assert outcome.err.startswith("rank 1 was killed by SIGKILL (out of memory?")
    assert "Traceback" not in outcome.err
    assert _status(run_dir)["error"].startswith("rank 1 was killed by SIGKILL")


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_rank_frozen_in_a_sum_over_all_ranks_is_named(run_dir: Path, frozen: int):
    """gloo's own error names nobody. The stand-in sums over all four ranks, so no rank waits for one neighbour alone.

    Some ranks run into the time limit, others only see the connections break that this ends; whoever leaves first can name the frozen.
    """
    process = _start(run_dir, "parallel=tp2_pp2", "launch.timeout_seconds=4", fault=f"freeze:{frozen}", until=5)
    log = run_dir / "logs" / f"rank-{frozen}.log"
    wait_until(lambda: frozen == 0 or "frozen" in log.read_text(), seconds=60)
    pid = next(int(line.split()[0]) for line in _ranks(run_dir) if f"RANK={frozen}" in line.split())
    named = f"rank {frozen} did not answer in time"
    wait_until(lambda: any(named in path.read_text() for path in run_dir.glob("logs/rank-*.error.json")), seconds=100)
    os.kill(pid, signal.SIGCONT)  # so that the launcher can end it at once
    outcome = finish(process)
    assert outcome.code == 1
    assert named in outcome.err
    assert f"({named})" in _status(run_dir)["error"]
    recorded = json.loads(next(run_dir.glob("logs/flight-gloo-*.json")).read_text())
    assert recorded["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    assert recorded["entries"][-1]["input_sizes"] == [[1000]]


def test_a_refusal_by_the_ranks_is_one_line(run_dir: Path):
    outcome = _train(run_dir, "parallel=tp2", steps=5000, fault="refuse:all")
    assert outcome.code == 2
    assert outcome.err == "tptrain: checkpoint.resume=/nope has no checkpoint: use checkpoint.resume=never\n"


def test_torchrun_shows_the_failing_rank_before_its_own_report(run_dir: Path):
    outcome = _train(run_dir, "parallel=tp2", steps=5000, fault="raise:1", torchrun=2)
    assert outcome.code == 1
    assert outcome.seconds < 200  # far from launch.timeout_seconds
    assert "rank 1 failed:\nTraceback" in outcome.err.split("ChildFailedError")[0]
    assert "Connection" not in outcome.err
    assert _status(run_dir)["error"] == "rank 1: RuntimeError: planted"


def test_an_error_in_the_only_process_is_a_plain_traceback(run_dir: Path):
    outcome = _train(run_dir, steps=5000, fault="raise:0")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback")
    assert outcome.err.endswith("RuntimeError: planted\n")
    assert _status(run_dir)["error"] == "RuntimeError: planted"
    assert "RuntimeError: planted" in _log(run_dir, 0)


def test_a_sweep_goes_on_after_a_failed_job(run_dir: Path):
    outcome = _train(run_dir, "-m", "train.max_steps=3,9", "hydra.sweep.dir=run", fault="raise:0")
    assert outcome.code == 1
    assert [_status(run_dir / job)["state"] for job in ("0", "1")] == ["done", "failed"]
    outcome = _train(run_dir, "-m", "train.max_steps=3,4", "hydra.sweep.dir=run")
    assert outcome.code == 0
    assert [_status(run_dir / job)["state"] for job in ("0", "1")] == ["done", "done"]


# ---- signals ---------------------------------------------------------------------------------------------


def test_sigterm_stops_all_ranks(run_dir: Path):
    process = _start(run_dir, "parallel=tp2")
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert (outcome.code, outcome.err) == (75, "tptrain: stopped by SIGTERM\n")
    assert outcome.seconds < 10  # 0.3 s alone on the machine
    assert _status(run_dir)["state"] == "stopped"


def test_ranks_that_listen_and_do_not_end_are_ended(run_dir: Path):
    process = _start(run_dir, "parallel=tp2", "launch.stop_seconds=2", fault="listen:all")
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert (outcome.code, outcome.err) == (75, "tptrain: stopped, but the ranks did not end within launch.stop_seconds=2\n")
    assert 1.5 < outcome.seconds < 30


def test_a_second_sigint_ends_ranks_that_do_not_listen(run_dir: Path):
    process = _start(run_dir, "parallel=tp2", fault="deaf:all")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.code == 1
    assert outcome.seconds < 8  # the ranks would have 10
    assert "Traceback" not in outcome.err
    wait_until(lambda: not processes_of(run_dir), seconds=2)


def test_ranks_die_with_a_killed_parent(run_dir: Path):
    process = _start(run_dir, "parallel=tp2")
    assert len(processes_of(run_dir)) == 2
    process.kill()
    finish(process)
    wait_until(lambda: not processes_of(run_dir), seconds=2)


def test_sigint_stops_the_only_process(run_dir: Path):
    process = _start(run_dir)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert (outcome.code, outcome.err) == (75, "tptrain: stopped by SIGINT\n")
    assert _status(run_dir)["state"] == "stopped"


# ---- the parts -------------------------------------------------------------------------------------------


def test_kinds_of_errors():
    gloo = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:15766. This is typically caused by")
    grown = ValueError("no result")
    grown.__context__ = gloo
    assert failures.kind_of(gloo) == "lost_peer"
    assert failures.kind_of(grown) == "lost_peer"
    assert failures.kind_of(RuntimeError("Timed out waiting 1000ms for recv operation to complete")) == "lost_peer"
    assert failures.kind_of(ValueError("Connection closed by peer")) == "error"
    assert failures.kind_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == "error"
    assert failures.kind_of(ConfigError("a=1 is bad: use 2")) == "refused"


@pytest.mark.parametrize(
    ("records", "exits", "cause"),
    [
        ({0: ("lost_peer", 10.0), 2: ("error", 10.5)}, {0: 1, 1: -15, 2: 1}, 2),  # recorded later, yet the cause
        ({0: ("lost_peer", 10.0)}, {0: 1, 1: -9}, 1),
        ({0: ("lost_peer", 10.0)}, {0: 1, 1: -15}, 0),
        ({0: ("error", 10.0), 1: ("error", 9.0)}, {0: 1, 1: 1}, 1),
        ({1: ("error", 30.0)}, {0: -6, 1: 1}, 1),  # gloo aborted a follower
        ({}, {0: -15, 1: 3}, 1),
        ({0: ("lost_peer", 9.0, 1), 1: ("lost_peer", 10.0, 2), 3: ("lost_peer", 11.0, 2)}, {0: 1, 1: 1, 2: -9, 3: 1}, 1),  # 2 froze
        ({0: ("lost_peer", 9.0, 1)}, {0: 1, 1: -9}, 0),
        ({0: ("lost_peer", 8.0), 1: ("lost_peer", 9.0, 2, 3)}, {0: 1, 1: 1, 2: -9, 3: -15}, 1),  # two of them froze
        ({0: ("lost_peer", 8.0, 1), 1: ("lost_peer", 9.0, 2)}, {0: 1, 1: -15, 2: -15}, 1),  # 0 waited for 1, and 1 for 2
    ],
)
def test_root_cause(records: dict, exits: dict, cause: int, tmp_path: Path):
    (tmp_path / "logs").mkdir()
    for rank, (kind, when, *waited_for) in records.items():
        failure = Failure(rank, when, kind, "text", "Traceback", waited_for=waited_for)
        failures._record_path(tmp_path, rank).write_text(json.dumps(failure.__dict__))
    found = failures.root_cause(tmp_path, {rank: (code, 20.0) for rank, code in exits.items()})
    assert found.rank == cause


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: set(range(8)))
    config = small_config(launch__threads_per_rank="auto")
    assert [ranks.threads(config, local) for local in (1, 3, 8, 9)] == [8, 2, 1, 1]
    assert ranks.threads(small_config(launch__threads_per_rank=5), 8) == 5


def test_devices(monkeypatch: pytest.MonkeyPatch):
    auto = small_config(hardware__device="auto", parallel__dp=1, parallel__tp=2)
    auto.parallel.dp = "auto"
    auto.train.global_batch_size = None
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    assert launch.settle(auto, None).hardware.device == "cpu"
    monkeypatch.setattr(launch, "count_gpus", lambda: 8)
    settled = launch.settle(auto, None)
    assert (settled.hardware.device, settled.parallel.dp) == ("cuda", 4)
    assert auto.hardware.device == "auto"
    monkeypatch.setattr(launch, "count_gpus", lambda: 1)
    with pytest.raises(ConfigError, match="but this machine has 1 GPU"):
        launch.settle(auto, None)
    with pytest.raises(ConfigError, match="this machine has 1 for 2 ranks"):
        launch.settle(auto, Place(rank=0, world_size=2, local_rank=0, local_world_size=2))
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"hardware.device=cuda needs a GPU"):
        launch.settle(small_config(hardware__device="cuda"), None)


def test_a_schedule_file_has_the_micro_batches_that_follow_from_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Eight GPUs, two stages: dp is 4, so of 32 sequences each copy has 8, in 4 micro-batches of 2. Two GPUs: 16 micro-batches."""
    file = tmp_path / "mine.txt"
    file.write_text(dumps(one_forward_one_backward(2, 1, 4)))
    auto = small_config(hardware__device="auto", parallel__pp=2, train__global_batch_size=32)
    auto.parallel.dp, auto.parallel.schedule = "auto", str(file)
    monkeypatch.setattr(launch, "count_gpus", lambda: 8)
    assert launch.settle(auto, None).parallel.micro_batches == 4
    monkeypatch.setattr(launch, "count_gpus", lambda: 2)
    with pytest.raises(ConfigError, match=r"holds 4 micro-batches, but parallel\.micro_batches=16"):
        launch.settle(auto, None)


def test_the_place_that_a_launcher_gives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    assert environment.given_place() is None
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert environment.given_place() == Place(rank=5, world_size=8, local_rank=1, local_world_size=4)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE=many is no number: start with torchrun"):
        environment.given_place()
