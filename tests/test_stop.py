"""Whole runs that are stopped or struck at chosen moments, with the real trainer: what is saved, the exit code, and what goes on after.

One run of each layout is stopped again and again, each time at another moment, and goes on from there. In the end it must have measured,
to the bit, what a run measures to which nothing happens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import Outcome, command, processes_of, wait_until
from tests.forked_command import MOMENTS, forked
from tests.support import SMALL, small_config
from tptrain import launch
from tptrain.failures import JobFailed
from tptrain.job import Job
from tptrain.monitor.metrics import read_metrics
from tptrain.stop import Wish

STEPS = 10


class Run:
    """One run folder, and the command that is started in it once and again."""

    def __init__(self, folder: Path, layout: str, ranks: int, *more: str) -> None:
        """ranks: of which somebody else has started each; 0: one process."""
        self.folder, self.run_dir, self.ranks = folder, folder / "run", ranks
        every = ["train.eval_every=4", "train.eval_steps=2", "checkpoint.every=6", "launch.threads_per_rank=1"]
        line = [word for word in SMALL if not word.startswith(("data=", "data.num_sequences", "data.vocab_size")) or not more]
        self.line = [*line, f"parallel={layout}", f"train.max_steps={STEPS}", *every, *more]

    def plan(self, moment: str, act: str, rank: str) -> str:
        """What should happen, once: see `tests/moments`."""
        return f"{moment} {act} {rank} {self.folder}/{moment}.{act}"

    def start(self, *plans: str, more: tuple[str, ...] = (), at: str = "run") -> Outcome:
        """The command, or the ranks, in processes that fork."""
        outcome = forked(self.folder, *self.line, f"hydra.run.dir={at}", *more, ranks=self.ranks, PLANS=",".join(plans))
        wait_until(lambda: not processes_of(self.run_dir), seconds=60)
        return outcome

    def command(self, *plans: str, more: tuple[str, ...] = ()) -> Outcome:
        """The command, which starts the ranks itself; no process of it is left."""
        path = f"{MOMENTS}:{Path.cwd()}"
        outcome = command(self.folder, *self.line, f"hydra.run.dir={self.run_dir}", *more, PYTHONPATH=path, PLANS=",".join(plans))
        wait_until(lambda: not processes_of(self.run_dir), seconds=60)
        return outcome

    def stops_in_every_part_of_a_step(self) -> None:
        """A signal that comes when the ranks have already agreed on a step counts for the next."""
        rank = "0" if self.ranks else "-"
        for moment, name, step in [
            ("backward", "SIGINT", 2),
            ("optimizer", "SIGUSR1", 4),  # whose evaluation is put off
            ("save", "SIGTERM", 7),  # while the checkpoint of step 6 is written
            ("evaluation", "SIGTERM", 8),  # in that of step 8
        ]:
            self.is_saved(self.start(self.plan(moment, f"{name}xOWN", rank)), step, name)

    def is_saved(self, outcome: Outcome, step: int, by: str) -> None:
        assert (outcome.code, outcome.err) == (75, f"tptrain: stopped by {by} after step {step}, saved as step-{step:08d}\n")
        assert self.status == {"state": "stopped", "step": step, "error": None}
        assert (self.run_dir / "checkpoints/latest").read_text().strip() == f"step-{step:08d}"

    def ends_before_the_first_step(self, outcome: Outcome) -> None:
        assert (outcome.code, outcome.err) == (75, "tptrain: stopped by SIGTERM\n"), "at once: there is nothing to save"
        assert self.status["state"] == "stopped"
        assert not list(self.run_dir.glob("checkpoints/*"))

    def is_what_an_unbroken_one_is(self) -> None:
        assert self.status == {"state": "done", "step": STEPS, "error": None}
        assert self.start(at="twin").code == 0
        assert measured(self.run_dir) == measured(self.folder / "twin")

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())


def measured(run_dir: Path) -> list[tuple[int, Any, Any, Any]]:
    """What a run measured, in order: step, loss, gradient norm, validation loss."""
    return [(record["step"], record.get("loss"), record.get("grad_norm"), record.get("val_loss")) for record in read_metrics(run_dir)]


def test_one_process_is_stopped_at_every_moment(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("the cat sat on the mat. " * 500)
    run = Run(tmp_path, "single", 0, "data=text", f"data.path={page}", "model.vocab_size=257", "train.sample_tokens=400")
    run.ends_before_the_first_step(run.start(run.plan("preparation", "SIGTERM", "-")))
    run.is_saved(run.start(more=("train.max_minutes=1e-6",)), 1, "train.max_minutes=1e-06")
    run.stops_in_every_part_of_a_step()
    run.is_saved(run.start(run.plan("forward", "SIGHUP", "-")), 9, "SIGHUP")
    outcome = run.start(run.plan("sampling", "SIGTERM", "-"))
    assert outcome.code == 0, outcome.err
    assert "The model writes" not in outcome.out, "which is left out, and nothing is lost"
    run.is_what_an_unbroken_one_is()


def test_four_ranks_are_stopped_at_every_moment(tmp_path: Path) -> None:
    """The command starts them itself where it has to tell them of the signal, or to start them again."""
    run = Run(tmp_path, "tp2_pp2", 4)
    run.ends_before_the_first_step(run.command(run.plan("preparation", "SIGTERM", "-")))
    run.is_saved(run.command(run.plan("forward", "SIGTERMxALL", "0")), 1, "SIGTERM")
    outcome = run.command(run.plan("forward", "SIGKILL", "1"), run.plan("backward", "SIGTERMxTWO", "0"), more=("train.max_restarts=2",))
    assert outcome.code == 1
    assert "rank 1 was killed by SIGKILL" in outcome.err
    assert outcome.err.endswith("tptrain: restart 1 of 2, from step-00000001\n"), "and the second signal ends it without a word"
    assert run.status == {"state": "failed", "step": 1, "error": "ended by a second signal, SIGTERM"}
    run.stops_in_every_part_of_a_step()
    assert run.start().code == 0
    run.is_what_an_unbroken_one_is()


# ---- starting the ranks again ------------------------------------------------------------------------------


def persevere(folder: Path, monkeypatch: pytest.MonkeyPatch, ends: list[Any], **changes: Any) -> tuple[Any, list[Job]]:
    """`launch._persevere` with ranks that end so, one after another: the value or the error in the end, and the job of each start."""
    folder.mkdir(exist_ok=True)
    job, jobs = Job("train", small_config(**changes), folder, folder, Wish()), []

    def spawn(job: Job, crew: None, again: bool = False) -> Any:
        jobs.append(Job.load("train", folder, folder) if (folder / "config.yaml").exists() else job)
        end = ends[len(jobs) - 1]
        if isinstance(end, str):
            job.wish.reason = "SIGTERM" if end == "asked" else None
            raise JobFailed("rank 1: planted", end)
        return end

    monkeypatch.setattr(launch, "_spawn", spawn)
    try:
        return launch._persevere(job, None), jobs
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
