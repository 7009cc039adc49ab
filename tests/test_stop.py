"""Whole runs that are stopped or struck at chosen moments, with the real trainer: what is saved, the exit code, and what goes on after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import Outcome, finish, processes_of, start, wait_until
from tests.support import SMALL
from tptrain.monitor.metrics import read_metrics

MOMENTS = str(Path(__file__).parent / "moments")
STEPS = 12
LAYOUTS = ("single", "tp2_pp2")
SIGNALS = {"forward": "SIGTERM", "backward": "SIGINT", "optimizer": "SIGUSR1", "save": "SIGTERM", "evaluation": "SIGTERM"}


def train(run_dir: Path, layout: str, *more: str, torchrun: int = 0, **variables: str) -> Outcome:
    """The command, with what should happen to it in variables."""
    line = [*SMALL, f"parallel={layout}", f"train.max_steps={STEPS}", "train.eval_every=4", "train.eval_steps=2", "checkpoint.every=5"]
    path = {"PYTHONPATH": f"{MOMENTS}:{Path.cwd()}", "MARK": f"{run_dir}.mark", "ALONE": str(int(layout == "single")), **variables}
    process = start(run_dir.parent, *line, f"hydra.run.dir={run_dir}", *more, torchrun=torchrun, **path)
    outcome = finish(process, timeout=500)
    wait_until(lambda: not processes_of(run_dir), seconds=5)
    return outcome


def records(run_dir: Path) -> list[tuple[int, Any, Any, Any]]:
    """What a run measured, in order: step, loss, gradient norm, validation loss."""
    return [(record["step"], record.get("loss"), record.get("grad_norm"), record.get("val_loss")) for record in read_metrics(run_dir)]


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, Any, Any, Any]]]:
    """For each layout what a run measures to which nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken")
    for layout in LAYOUTS:
        outcome = train(folder / layout, layout)
        assert outcome.code == 0, outcome.err
    return {layout: records(folder / layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moment", SIGNALS)
def test_a_signal_in_a_step_saves_and_stops(moment: str, layout: str, unbroken: dict, tmp_path: Path) -> None:
    """The step is finished; started again, the run measures what the unbroken one does, to the bit, evaluations included."""
    run_dir = tmp_path / "run"
    outcome = train(run_dir, layout, MOMENT=moment, ACT=SIGNALS[moment])
    assert outcome.code == 75, outcome.err
    step = status(run_dir)["step"]
    assert status(run_dir) == {"state": "stopped", "step": step, "error": None}
    assert 4 <= step < STEPS
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"step-{step:08d}"
    assert outcome.err == f"tptrain: stopped by {SIGNALS[moment]} after step {step}, saved as step-{step:08d}\n"
    assert train(run_dir, layout).code == 0
    assert records(run_dir) == unbroken[layout]
    assert status(run_dir)["state"] == "done"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moment", ["preparation", "loading"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(moment: str, layout: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = train(run_dir, layout, MOMENT=moment, ACT="SIGTERM")
    assert outcome.code == 75, outcome.err
    assert outcome.err == "tptrain: stopped by SIGTERM\n"
    assert outcome.seconds < 50, "the moment would take 60"
    assert status(run_dir)["state"] == "stopped"
    assert not list(run_dir.glob("checkpoints/*"))


def test_a_signal_to_everybody_three_times_is_one(unbroken: dict, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = train(run_dir, "tp2_pp2", MOMENT="forward", ACT="SIGTERM", EVERYBODY="1")
    assert outcome.code == 75, outcome.err
    assert (run_dir / f"checkpoints/step-{status(run_dir)['step']:08d}").is_dir()
    assert train(run_dir, "tp2_pp2").code == 0
    assert records(run_dir) == unbroken["tp2_pp2"]


def test_a_signal_to_the_ranks_of_torchrun_saves(unbroken: dict, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = train(run_dir, "tp2_pp2", torchrun=4, MOMENT="backward", ACT="SIGTERM")
    assert outcome.code == 1, "torchrun's own"
    step = status(run_dir)["step"]
    assert status(run_dir) == {"state": "stopped", "step": step, "error": None}
    assert (run_dir / f"checkpoints/step-{step:08d}").is_dir()
    assert train(run_dir, "tp2_pp2", torchrun=4).code == 0
    assert records(run_dir) == unbroken["tp2_pp2"]


def test_a_signal_while_the_model_writes_leaves_a_run_that_is_done(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("the cat sat on the mat. " * 200)
    text = ["data=text", f"data.path={page}", "model.vocab_size=257", "train.sample_tokens=5000", "~data.num_sequences", "~data.vocab_size"]
    run_dir = tmp_path / "run"
    line = [word for word in SMALL if not word.startswith(("data=", "data.num_sequences", "data.vocab_size"))]
    variables = {"PYTHONPATH": f"{MOMENTS}:{Path.cwd()}", "MARK": f"{run_dir}.mark", "ALONE": "1", "MOMENT": "sampling", "ACT": "SIGTERM"}
    outcome = finish(start(tmp_path, *line, *text[:-2], "train.max_steps=2", f"hydra.run.dir={run_dir}", **variables), timeout=500)
    assert outcome.code == 0, outcome.err
    assert status(run_dir) == {"state": "done", "step": 2, "error": None}
    assert "The model writes" not in outcome.out


def test_max_minutes_saves_and_stops(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = train(run_dir, "tp2_pp2", "train.max_steps=1000000", "train.max_minutes=0.05", "train.eval_every=0")
    assert outcome.code == 75, outcome.err
    step = status(run_dir)["step"]
    assert outcome.err == f"tptrain: stopped by train.max_minutes=0.05 after step {step}, saved as step-{step:08d}\n"


@pytest.mark.parametrize("act", ["kill", "raise"])
def test_the_ranks_start_again_from_the_newest_checkpoint(act: str, unbroken: dict, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ("train.max_restarts=2", "checkpoint.every=2", "checkpoint.resume=never")
    outcome = train(run_dir, "tp2_pp2", *more, MOMENT="forward", ACT=act, WHERE="1")
    assert outcome.code == 0, outcome.err
    assert "rank 1 failed" in outcome.err if act == "raise" else "rank 1 was killed by SIGKILL" in outcome.err
    assert outcome.err.count("tptrain: restart 1 of 2, from step-00000002") == 1
    assert "restart 2" not in outcome.err
    assert records(run_dir) == unbroken["tp2_pp2"]
    assert status(run_dir) == {"state": "done", "step": STEPS, "error": None}


def test_what_fails_each_time_fails_the_job_after_the_last_restart(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = train(run_dir, "tp2_pp2", "train.max_restarts=1", MOMENT="backward", ACT="raise", WHERE="2", MARK="/nowhere/at/all")
    assert outcome.code == 1
    assert outcome.err.count("tptrain: restart 1 of 1, from where the run began") == 1
    assert outcome.err.count("rank 2 failed") == 2, "each attempt's own cause"
    assert status(run_dir)["state"] == "failed"
