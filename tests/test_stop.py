"""Whole runs that are stopped or struck at chosen moments, with the real trainer: what is saved, the exit code, and what goes on after.

One run of each layout is stopped again and again, each time at another moment, and goes on from there. In the end it must have measured,
to the bit, what a run measures to which nothing happens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import Outcome, finish, processes_of, start, wait_until
from tests.ranks import run_ranks
from tests.support import SMALL, small_config
from tptrain import launch
from tptrain.failures import JobFailed
from tptrain.job import Job
from tptrain.monitor.metrics import read_metrics
from tptrain.stop import Wish

MOMENTS = str(Path(__file__).parent / "moments")
STEPS = 10


class Run:
    """One run folder, and the command that is started in it once and again."""

    def __init__(self, folder: Path, layout: str, *more: str) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        line = [*SMALL, f"parallel={layout}", f"train.max_steps={STEPS}", "train.eval_every=4", "train.eval_steps=2", "checkpoint.every=6"]
        self.line = [*line, "launch.threads_per_rank=1", f"hydra.run.dir={self.run_dir}", *more]
        self.rank_0 = "None" if layout == "single" else "0"  # it works inside the command

    def start(self, moment: str = "", act: str = "", *more: str, where: str | None = None, torchrun: int = 0) -> Outcome:
        """The command, with what should happen to it; no process of it is left."""
        variables = {"MOMENT": moment, "ACT": act, "MARK": f"{self.run_dir}.{moment}.{act}", "WHERE": where or self.rank_0}
        path = f"{MOMENTS}:{Path.cwd()}"
        process = start(self.folder, *self.line, *more, torchrun=torchrun, PYTHONPATH=path, **variables)
        outcome = finish(process)
        wait_until(lambda: not processes_of(self.run_dir), seconds=60)
        return outcome

    def stops(self, moment: str, act: str, step: int, by: str, *more: str) -> None:
        """Start it; it is stopped, and saved after `step`."""
        outcome = self.start(moment, act, *more)
        assert (outcome.code, outcome.err) == (75, f"tptrain: stopped by {by} after step {step}, saved as step-{step:08d}\n")
        self.is_saved(step)

    def is_saved(self, step: int) -> None:
        assert self.status == {"state": "stopped", "step": step, "error": None}
        assert (self.run_dir / "checkpoints/latest").read_text().strip() == f"step-{step:08d}"

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())


def stop_before_the_first_step(run: Run) -> None:
    outcome = run.start("preparation", "SIGTERM", where="None")
    assert (outcome.code, outcome.err) == (75, "tptrain: stopped by SIGTERM\n"), "at once: there is nothing to save"
    assert run.status["state"] == "stopped"
    assert not list(run.run_dir.glob("checkpoints/*"))


def stop_in_every_part_of_a_step(run: Run, done: int) -> None:
    """After `done` steps. A signal that comes when the ranks have already agreed on a step counts for the next."""
    run.stops("forward", "SIGTERM 3", done + 1, "SIGTERM")
    run.stops("backward", "SIGINT", done + 2, "SIGINT")
    run.stops("optimizer", "SIGUSR1", 4, "SIGUSR1")  # whose evaluation is put off
    run.stops("save", "SIGTERM", 7, "SIGTERM")
    run.stops("evaluation", "SIGTERM", 8, "SIGTERM")


def measured(run_dir: Path) -> list[tuple[int, Any, Any, Any]]:
    """What a run measured, in order: step, loss, gradient norm, validation loss."""
    return [(record["step"], record.get("loss"), record.get("grad_norm"), record.get("val_loss")) for record in read_metrics(run_dir)]


def unbroken(run: Run) -> list[tuple[int, Any, Any, Any]]:
    """What the run measures when nothing happens to it, in ranks that the command does not start."""
    (store,) = (run.folder / "outputs/token_stores").glob("[!.]*-*")
    job = Job.load("train", run.run_dir, store)
    job.config.train.sample_tokens, job.config.train.max_minutes = 0, None
    twin = run.folder / "twin"
    run_ranks(job.config.processes, train, job, twin)
    return measured(twin)


def train(rank: int, job: Job, run_dir: Path) -> None:
    from tptrain.train import train as train_here

    train_here(job.config, run_dir, job.store_dir)


def test_one_process_is_stopped_at_every_moment(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("the cat sat on the mat. " * 500)
    text = (f"data.path={page}", "model.vocab_size=257", "train.sample_tokens=400")
    run = Run(tmp_path, "single", "data=text", *text)
    run.line = [word for word in run.line if not word.startswith(("data=memorize", "data.num_sequences", "data.vocab_size"))]
    stop_before_the_first_step(run)
    run.stops("", "", 1, "train.max_minutes=1e-06", "train.max_minutes=1e-6")
    stop_in_every_part_of_a_step(run, done=1)
    outcome = run.start("sampling", "SIGTERM")
    assert outcome.code == 0, outcome.err
    assert "The model writes" not in outcome.out, "which is left out, and nothing is lost"
    assert run.status == {"state": "done", "step": STEPS, "error": None}
    assert measured(run.run_dir) == unbroken(run)


def test_four_ranks_are_stopped_at_every_moment(tmp_path: Path) -> None:
    run = Run(tmp_path, "tp2_pp2")
    stop_before_the_first_step(run)
    stop_in_every_part_of_a_step(run, done=0)
    outcome = run.start("forward", "SIGTERM again")
    assert (outcome.code, outcome.err) == (1, "")
    assert run.status == {"state": "failed", "step": 8, "error": "ended by a second signal, SIGTERM"}
    outcome = run.start("backward", "SIGTERM", torchrun=4)
    assert outcome.code == 1, "torchrun's own"
    run.is_saved(9)
    outcome = run.start("forward", "kill", "train.max_restarts=2", "checkpoint.resume=auto", where="1")
    assert outcome.code == 0, outcome.err
    assert "rank 1 was killed by SIGKILL" in outcome.err
    assert outcome.err.count("tptrain: restart") == outcome.err.count("tptrain: restart 1 of 2, from step-00000009") == 1
    assert run.status == {"state": "done", "step": STEPS, "error": None}
    assert measured(run.run_dir) == unbroken(run)


# ---- starting the ranks again ------------------------------------------------------------------------------


def persevere(folder: Path, monkeypatch: pytest.MonkeyPatch, ends: list[Any], **changes: Any) -> tuple[Any, list[Job]]:
    """`launch._persevere` with ranks that end so, one after another: the value or the error in the end, and the job of each start."""
    folder.mkdir(exist_ok=True)
    job, jobs = Job("train", small_config(**changes), folder, folder, Wish()), []

    def spawn(job: Job) -> Any:
        jobs.append(Job.load("train", folder, folder) if (folder / "config.yaml").exists() else job)
        end = ends[len(jobs) - 1]
        if isinstance(end, str):
            job.wish.reason = "SIGTERM" if end == "asked" else None
            raise JobFailed("rank 1: planted", end)
        return end

    monkeypatch.setattr(launch, "_spawn", spawn)
    try:
        return launch._persevere(job), jobs
    except JobFailed as failed:
        return failed.kind, jobs


def test_how_often_ranks_are_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def end_of(*ends: Any, **changes: Any) -> tuple[Any, int]:
        value, jobs = persevere(tmp_path, monkeypatch, [*ends], **changes)
        return value, len(jobs)

    assert end_of(1.5) == (1.5, 1)
    assert end_of("error") == ("error", 1), "train.max_restarts=0"
    assert end_of("error", "killed", 1.5, train__max_restarts=2) == (1.5, 3)
    assert capsys.readouterr().err.splitlines() == [f"tptrain: restart {attempt} of 2, from where the run began" for attempt in (1, 2)]
    assert end_of("killed", "lost_peer", "error", train__max_restarts=2) == ("error", 3)
    assert end_of("diverged", 1.5, train__max_restarts=2) == ("diverged", 1), "it would again"
    assert end_of("asked", 1.5, train__max_restarts=2) == ("asked", 1), "somebody wants it to stop"


def test_a_restart_goes_on_from_the_newest_checkpoint_with_the_minutes_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__max_restarts": 1, "checkpoint__resume": "never", "train__max_minutes": 5.0}
    _, (_, again) = persevere(tmp_path / "new", monkeypatch, ["error", 1.5], **changes)
    assert again.config.checkpoint.resume == "never", "there is none yet"
    (tmp_path / "run/checkpoints/step-00000004").mkdir(parents=True)
    monkeypatch.setattr(launch.time, "monotonic", iter([100.0, 190.0]).__next__)
    _, (_, again) = persevere(tmp_path / "run", monkeypatch, ["error", 1.5], **changes)
    assert again.config.checkpoint.resume == "auto", "else what it began from"
    assert again.config.train.max_minutes == pytest.approx(5.0 - 1.5)
