"""Uploads to a stand-in for W&B's server on loopback, by wandb's own code: one that takes runs, and three that do not."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.command import processes_of
from tests.wandb_records import files_with, history, read_back, recording
from tests.wandb_server import KEY, wandb_server
from tptrain.config import Config
from tptrain.monitor.metrics import Record
from tptrain.monitor.uploader import trouble
from tptrain.monitor.wandb_id import kept_id
from tptrain.monitor.wandb_run import start_wandb

STEPS: list[Record] = [{"step": step, "loss": 0.5**step, "time": 1e9 + step} for step in range(1, 9)]
LOGGED = [{key: value for key, value in record.items() if key != "time"} for record in STEPS]


pytestmark = pytest.mark.usefixtures("own_home")


def record_run(config: Config, run_dir: Path, first: int, last: int, state: str = "done") -> tuple[float, list[str]]:
    """Log steps after `first` up to `last`, as a resume would; the seconds that this took from the training, and what was said."""
    said: list[str] = []
    run = start_wandb(config, run_dir, {}, earlier=STEPS[:first], say=said.append)
    deadline = time.monotonic() + 60
    while not list(run_dir.glob("wandb/offline-run-*/logs/upload.log")) and time.monotonic() < deadline and config.wandb.mode == "online":
        time.sleep(0.05)  # training goes on for longer than wandb takes to start
    seconds = 0.0
    for record in STEPS[first:last]:
        began = time.perf_counter()
        run.log(record)
        seconds += time.perf_counter() - began
        time.sleep(0.05)
    began = time.perf_counter()
    run.finish(state)
    return seconds + time.perf_counter() - began, said


def test_a_run_reaches_the_server_and_goes_on_there(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.wandb.mode, config.wandb.group, config.wandb.upload_seconds = "online", "study", 120.0
    with wandb_server("takes") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        _, said = record_run(config, tmp_path, 0, 6)
        made = kept_id(tmp_path)
        assert made is not None
        assert server.history(made) == LOGGED[:6]
        assert server.ended == {made: 0}
        assert said == [f"W&B: {server.url}/team/tptrain/runs/{made}"]
        first = server.upserts[made][0]
        assert (first["displayName"], first["groupName"], first["tags"]) == ("gpt_tiny-tp2_pp2-lr3e-3", "study", ["a", "b"])
        assert '"lr":{"value":' not in first["config"], "keys stand in their groups"
        assert '"hidden_size":128' in first["config"]
        record_run(config, tmp_path, 4, 8)
        assert server.history(made) == LOGGED
        assert list(server.upserts) == [made], "one run"
    assert not processes_of(tmp_path)
    assert not files_with(tmp_path, KEY)


def test_an_agent_of_a_wandb_sweep_chooses_the_run(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.wandb.mode, config.wandb.upload_seconds = "online", 120.0
    (tmp_path / "choice.yaml").write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.125\n")
    for name, value in {"ID": "a_sweep", "PARAM_PATH": str(tmp_path / "choice.yaml")}.items():
        monkeypatch.setenv(f"WANDB_SWEEP_{name}", value)
    for name, value in {"RUN_ID": "agents_id", "PROJECT": "agents", "API_KEY": KEY}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with wandb_server("takes") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        record_run(config, tmp_path / "run", 0, 2)
        assert server.history("agents_id") == LOGGED[:2]
        first = server.upserts["agents_id"][0]
    assert (first["sweep"], first["project"]) == ("a_sweep", "agents")
    assert '"optimizer.lr":{"value":0.125}' in first["config"]
    assert kept_id(tmp_path / "run") == "agents_id"


@pytest.mark.parametrize("behaviour", ["fails", "hangs", "refuses"])
def test_a_broken_server_costs_less_than_a_second_and_no_record(
    behaviour: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    offline, _ = record_run(config, tmp_path / "offline", 0, 8)
    config.wandb.mode = "online"
    with wandb_server(behaviour) as server:
        url = server.url if behaviour != "refuses" else f"http://127.0.0.1:{closed_port()}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        online, said = record_run(config, tmp_path / "online", 0, 8)
    assert online - offline < 1.0
    assert not said
    assert history(read_back(recording(tmp_path / "online"))) == LOGGED
    shown = capfd.readouterr()
    reason = {"fails": "answers HTTP 500", "hangs": "does not answer", "refuses": "cannot be reached"}[behaviour]
    folder = recording(tmp_path / "online").parent
    assert shown.err == f"warning: W&B has the run on disk only: {url} {reason}. To upload it: wandb sync {folder}\n"
    assert shown.out == ""
    assert not processes_of(tmp_path)
    assert not files_with(tmp_path, KEY)


def test_a_server_that_refuses_the_question_is_there() -> None:
    with wandb_server("forbids") as server:
        assert trouble(server.url, 30) is None
    assert trouble("http://127.0.0.1:x", 30) == "http://127.0.0.1:x cannot be reached"


def closed_port() -> int:
    """A port of loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
