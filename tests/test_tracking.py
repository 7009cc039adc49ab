"""What whole runs leave for people to look at: the W&B recording over kills and stops, and who warns where."""

from __future__ import annotations

import json
from pathlib import Path

from tests.command import FAULTS, Outcome, finish, start
from tests.support import SMALL
from tests.wandb_records import files_with, history, read_back, recording
from tests.wandb_server import KEY
from tptrain.monitor.metrics import read_metrics

MOMENTS = str(Path(__file__).parent / "moments")
STEPS = 8


def train(run_dir: Path, act: str = "") -> Outcome:
    """A part of one run, with what happens to it in its fourth step."""
    line = [word for word in SMALL if not word.startswith("wandb=")]
    line += ["wandb=offline", f"train.max_steps={STEPS}", "checkpoint.every=2", f"hydra.run.dir={run_dir}"]
    plans = f"forward@3 {act} - {run_dir}.{act}" if act else ""
    variables = {"PYTHONPATH": f"{MOMENTS}:{Path.cwd()}", "PLANS": plans, "WANDB_API_KEY": KEY}
    return finish(start(run_dir.parent, *line, **variables), timeout=500)


def test_the_recording_has_each_step_once_over_a_kill_and_a_stop(tmp_path: Path) -> None:
    """The kill takes back a logged step; the stop is a scheduler's, whose signal goes to wandb's process too."""
    run_dir = tmp_path / "run"
    assert train(run_dir, "SIGKILL").code == -9
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3]
    stopped = train(run_dir, "SIGTERMxALL")
    assert stopped.code == 75, stopped.err
    assert [row["step"] for row in history(read_back(recording(run_dir)))] == [1, 2, 3, 4], "with its tail"
    made = (run_dir / "wandb_id").read_text()
    (newest,) = run_dir.glob("checkpoints/step-00000004/state.json")
    assert json.loads(newest.read_text())["wandb_id"] == made.strip()
    (run_dir / "wandb_id").unlink()  # as where only the checkpoints were brought along
    ended = train(run_dir)
    assert ended.code == 0, ended.err
    assert "W&B" not in ended.out + ended.err

    records = read_back(recording(run_dir))
    expected: dict[int, dict] = {}
    for record in read_metrics(run_dir):
        known = {key: value for key, value in record.items() if value is not None and key != "time"}
        expected.setdefault(record["step"], {}).update(known)
    assert list(expected) == list(range(1, STEPS + 1))
    assert history(records) == list(expected.values())
    assert (run_dir / "wandb_id").read_text() == made
    assert recording(run_dir).name == f"run-{made.strip()}.wandb"
    assert [record["exit"].get("exit_code", 0) for record in records if record["type"] == "exit"] == [0]
    assert not files_with(run_dir, KEY)


def test_a_warning_of_every_rank_is_shown_once_and_in_every_log(tmp_path: Path) -> None:
    line = ["experiment=memorize", "wandb=disabled", "hardware=cpu", "hydra.run.dir=run", "train.max_steps=8", "parallel=pp2"]
    outcome = finish(start(tmp_path, *line, PYTHONPATH=str(FAULTS), FAULT="warn:all"), timeout=500)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    for said in ("UserWarning: planted warning", "planted log line"):
        assert outcome.err.count(said) == 1
        for rank in (0, 1):
            assert (tmp_path / f"run/logs/rank-{rank}.log").read_text().count(said) == 1
