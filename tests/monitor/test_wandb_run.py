"""W&B offline is real here: one run is recorded by wandb itself and read back by its own reader."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tptrain.monitor.wandb_run import WandbRun, run_name, start_wandb

KEY = "0123456789abcdef0123456789abcdef01234567"
"""Looks like an API key."""


@pytest.fixture
def _own_home(tmp_path_factory, monkeypatch):
    """No key, settings or cache of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def read_back(run_file: Path) -> list[dict]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_file)]
    return [json.loads(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()]


@pytest.mark.usefixtures("_own_home")
def test_an_offline_run_reads_back_and_keeps_its_id(config, tmp_path, monkeypatch, capfd):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_dir = tmp_path / "my run"
    try:
        run = start_wandb(config, run_dir, {"parameters": 5, "run_dir": run_dir})
        assert run.active
        for step in (10, 20, 30):
            run.log({"step": step, "loss": 1 / step, "mfu": None, "grad_norm": float("nan")})
        run.log({"step": 30, "val_loss": 2.0})
        run.finish()
        run.finish()
        made = (run_dir / "wandb_id").read_text().strip()

        time.sleep(1.1)  # W&B names the folder by the second
        again = start_wandb(config, run_dir, {})
        again.log({"step": 40, "loss": 0.25})
        again.finish()
    finally:
        wandb.teardown()
    assert (run_dir / "wandb_id").read_text().strip() == made
    first, second = sorted(run_dir.glob(f"wandb/offline-run-*-{made}/run-{made}.wandb"), key=lambda path: path.stat().st_mtime)

    records = read_back(first)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    assert rows == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 30, "loss": pytest.approx(1 / 30), "val_loss": 2}]
    (described,) = [record["run"] for record in records if record["type"] == "run"]
    assert (described["run_id"], described["display_name"], described["project"]) == (made, "gpt_tiny-tp2_pp2", "tptrain")
    kept = described["config"]["update"]
    assert {key: kept[key] for key in dataclasses.asdict(config)} == dataclasses.asdict(config)
    assert kept["facts"] == {"parameters": 5, "run_dir": str(run_dir)}
    (metric,) = [record["metric"] for record in records if record["type"] == "metric"]
    assert (metric["glob_name"], metric["step_metric"]) == ("*", "step")

    (row,) = [record["history"] for record in read_back(second) if record["type"] == "history"]
    assert (row["item"]["loss"], row["step"]["num"]) == (0.25, 40)

    assert not [path for path in run_dir.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert "".join(capfd.readouterr()) == ""


def test_disabled_writes_nothing_and_imports_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.wandb.mode = "disabled"
    run = start_wandb(config, tmp_path, {})
    run.log({"step": 1, "loss": 1.0})
    run.finish()
    assert not run.active
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_start_is_one_warning(config, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise RuntimeError("no server\n  at all")

    monkeypatch.setattr(wandb, "setup", lambda **_: None)
    monkeypatch.setattr(wandb, "init", refuse)
    run = start_wandb(config, tmp_path, {})
    run.log({"step": 1, "loss": 1.0})
    run.finish()
    assert not run.active
    assert capsys.readouterr().err == "warning: W&B did not start, training goes on without it: no server at all\n"


def test_wandb_that_is_not_installed_is_one_warning(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert not start_wandb(config, tmp_path, {}).active
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_breaks_midway_is_one_warning(capsys):
    class Broken:
        def log(self, *_, **__):
            raise ConnectionError("gone")

        def finish(self, **_):
            raise ConnectionError("gone")

    run = WandbRun(Broken())
    run.log({"step": 1, "loss": 1.0})
    run.log({"step": 2, "loss": 1.0})
    run.finish()
    assert capsys.readouterr().err == "warning: W&B stops recording, training goes on without it: gone\n"
    WandbRun(Broken()).finish()
    assert "did not finish" in capsys.readouterr().err


ONLINE = """
import pickle, sys
from pathlib import Path
from tptrain.monitor.wandb_run import start_wandb
config = pickle.loads(bytes.fromhex(sys.argv[1]))
config.wandb.mode = "online"
print("active", start_wandb(config, Path(sys.argv[2]), {}).active)
"""


@pytest.mark.usefixtures("_own_home")
def test_online_without_a_key_never_asks_on_a_terminal(config, tmp_path):
    """A real terminal is there to ask on; without our care W&B prints a menu and waits for an answer."""
    import pickle
    import pty

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
    lines = shown.decode().split("\r\n")
    assert lines[0].startswith("warning: W&B did not start, training goes on without it: ")
    assert lines[1:] == ["active False", ""]


@pytest.mark.parametrize(
    ("sizes", "name"), [((1, 1, 1), "gpt_tiny-single"), ((2, 2, 1), "gpt_tiny-tp2_pp2"), ((1, 4, 2), "gpt_tiny-pp4_dp2")]
)
def test_a_run_is_named_after_model_and_layout(config, sizes, name):
    config.parallel.tp, config.parallel.pp, config.parallel.dp = sizes
    assert run_name(config) == name
