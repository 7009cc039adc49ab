"""W&B offline is real here: runs are recorded by wandb itself and read back by its own reader."""

from __future__ import annotations

import dataclasses
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import wait_until
from tests.wandb_records import files_with, history, read_back, recording
from tests.wandb_server import KEY
from tptrain.config import Config
from tptrain.monitor.metrics import MetricsFile, Record
from tptrain.monitor.wandb_id import adopt_id, kept_id, run_name
from tptrain.monitor.wandb_run import start_wandb

STEPS: list[Record] = [{"step": step, "loss": 1 / step, "mfu": None, "grad_norm": float("nan"), "time": 1e9 + step} for step in range(1, 7)]
LOGGED = [{"step": step, "loss": pytest.approx(1 / step)} for step in range(1, 7)]


pytestmark = pytest.mark.usefixtures("own_home")


def test_one_recording_has_the_run_over_two_resumes(config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where a resume goes back to an earlier step."""
    run_dir = tmp_path / "my run"
    config.wandb.group = "some sweep"
    run = start_wandb(config, run_dir, {"parameters": 5, "run_dir": run_dir})
    assert run.active
    for record in STEPS[:4]:
        run.log(record)
    run.log({"step": 4, "val_loss": 2.0})
    run.finish()
    run.finish()
    made = kept_id(run_dir)
    assert history(read_back(recording(run_dir))) == [*LOGGED[:3], {**LOGGED[3], "val_loss": 2}]

    for known, following, state in ((2, 4, "stopped"), (4, 6, "done")):
        again = start_wandb(config, run_dir, {"parameters": 5, "run_dir": run_dir}, earlier=STEPS[:known])
        for record in STEPS[known:following]:
            again.log(record)
        again.finish(state)
        assert history(read_back(recording(run_dir))) == LOGGED[:following]
    assert kept_id(run_dir) == made

    records = read_back(recording(run_dir))
    times = [record["history"]["item"]["_timestamp"] for record in records if record["type"] == "history"]
    assert times == [record["time"] for record in STEPS], "also of the steps that were recorded again"
    (described,) = [record["run"] for record in records if record["type"] == "run"]
    expected = (made, "gpt_tiny-tp2_pp2-lr3e-3", "tptrain", "some sweep")
    assert tuple(described[key] for key in ("run_id", "display_name", "project", "run_group")) == expected
    kept = described["config"]["update"]
    assert {key: kept[key] for key in dataclasses.asdict(config)} == dataclasses.asdict(config)
    assert kept["facts"]["parameters"] == 5
    assert kept["facts"]["versions"]["wandb"] == __import__("wandb").__version__
    assert "git_commit" in kept["facts"]
    (metric,) = [record["metric"] for record in records if record["type"] == "metric"]
    assert (metric["glob_name"], metric["step_metric"]) == ("*", "step")
    assert [record["exit"].get("exit_code", 0) for record in records if record["type"] == "exit"] == [0]
    assert not files_with(run_dir, KEY)
    assert "".join(capfd.readouterr()) == ""


def test_recordings_stay_where_the_steps_before_are_not_known(config: Config, tmp_path: Path) -> None:
    for earlier in ((), None):
        run = start_wandb(config, tmp_path, {}, earlier=earlier)
        run.log(STEPS[0])
        run.finish("failed")
    first, second = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert first.name == second.name == f"run-{kept_id(tmp_path)}.wandb"
    assert [record["exit"]["exit_code"] for record in read_back(first) if record["type"] == "exit"] == [1]


def test_what_a_scheduler_s_signal_to_every_process_cuts_off_is_recorded_anew(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb's own process dies with up to 32 KiB of what it was given."""
    monkeypatch.setattr("tptrain.monitor.wandb_recorder._FLUSH_SECONDS", 0.2)
    metrics = MetricsFile(tmp_path, 0)
    run = start_wandb(config, tmp_path, {})
    for record in STEPS[:5]:
        metrics.write(record)
        run.log(record)
    wait_until(lambda: history(read_back(recording(tmp_path))) if list(tmp_path.glob("wandb/*/run-*.wandb")) else False, 60)
    (core,) = [pid for pid in children(os.getpid()) if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(core, signal.SIGTERM)
    wait_until(lambda: Path(f"/proc/{core}/stat").read_text().split()[2] == "Z")
    metrics.write(STEPS[5])
    run.log(STEPS[5])
    run.finish("stopped")
    assert history(read_back(recording(tmp_path))) == LOGGED


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def test_disabled_writes_nothing_and_imports_nothing(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.wandb.mode = "disabled"
    run = start_wandb(config, tmp_path, {})
    run.log({"step": 1, "loss": 1.0})
    run.finish()
    assert not run.active
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_start_is_one_warning(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise RuntimeError("no room\n  at all")

    monkeypatch.setattr(wandb, "init", refuse)
    run = start_wandb(config, tmp_path, {})
    run.log({"step": 1, "loss": 1.0})
    run.finish()
    assert not run.active
    assert capsys.readouterr().err == "warning: W&B records nothing: no room at all; metrics.jsonl has all numbers\n"


def test_wandb_that_is_not_installed_is_one_warning(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    start_wandb(config, tmp_path, {}).finish()
    assert capsys.readouterr().err.count("\n") == 1


ONLINE = """
import pickle, sys, time
from pathlib import Path
from tptrain.monitor.wandb_run import start_wandb
config = pickle.loads(bytes.fromhex(sys.argv[1]))
config.wandb.mode = "online"
run = start_wandb(config, Path(sys.argv[2]), {})
step = 0
while not run._recorder._told:
    step += 1
    run.log({"step": step})
    time.sleep(0.1)
run.finish()
"""


def test_online_without_a_key_never_asks_on_a_terminal(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real terminal is there to ask on, and W&B would ask; the run is on disk, and one line says why it is not uploaded."""
    import pickle

    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", ONLINE, pickle.dumps(config).hex(), str(tmp_path)]
    child = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
            if b"Enter your choice" in shown:
                break
    except OSError:  # the child closed its end
        pass
    finally:
        child.kill() if b"Enter your choice" in shown else None
        child.wait(60)
        os.close(leader)
    (line,) = shown.decode().strip().splitlines()
    assert line.startswith("warning: W&B has the run on disk only: No API key configured. Use `wandb login` to log in. To upload it: ")
    assert line.endswith(f"wandb sync {recording(tmp_path).parent}")
    steps = [row["step"] for row in history(read_back(recording(tmp_path)))]
    assert steps == list(range(1, len(steps) + 1))
    assert steps


@pytest.mark.parametrize(
    ("sizes", "schedule", "name"),
    [
        ((1, 1, 1), "zb_h1", "gpt_tiny-single-lr3e-3"),
        ((2, 2, 1), "1f1b", "gpt_tiny-tp2_pp2-lr3e-3"),
        ((1, 4, 2), "zb_h1", "gpt_tiny-pp4_dp2-zb_h1-lr3e-3"),
        ((1, 2, 1), "docs/schedules/my_own.txt", "gpt_tiny-pp2-my_own-lr3e-3"),
    ],
)
def test_a_run_is_named_after_its_choices(config: Config, sizes: tuple[int, int, int], schedule: str, name: str) -> None:
    config.parallel.tp, config.parallel.pp, config.parallel.dp = sizes
    config.parallel.schedule = schedule
    assert run_name(config) == name


def test_a_folder_takes_the_id_of_a_checkpoint_once(tmp_path: Path) -> None:
    adopt_id(tmp_path, None)
    assert kept_id(tmp_path) is None
    adopt_id(tmp_path, "first")
    adopt_id(tmp_path, "second")
    assert kept_id(tmp_path) == "first"
