"""Whole runs by the command: what lands in the run folder, and what a killed run loses (nothing)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import command, environment, finish, processes_of, wait_until
from tests.support import SMALL
from tptrain.monitor.metrics import read_metrics

STEPS = 24


def arguments(run_dir: Path, *more: str) -> list[str]:
    """A small run of STEPS steps that saves every fifth."""
    return [*SMALL, f"train.max_steps={STEPS}", "checkpoint.every=5", f"hydra.run.dir={run_dir}", *more]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every logged training step; all must be there once, in order."""
    records = [record for record in read_metrics(run_dir) if "loss" in record]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    outcome = command(folder, *arguments(folder / "run"))
    assert outcome.code == 0, outcome.err
    return folder / "run"


def start_run(folder: Path, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, so that all of it can be killed at once."""
    line = [sys.executable, "-m", "tptrain", *arguments(run_dir, *more)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def kill_all(process: subprocess.Popen[str], run_dir: Path) -> None:
    """SIGKILL to the command and all its ranks."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not processes_of(run_dir))


def test_the_run_folder(unbroken: Path) -> None:
    assert [step for step, _, _ in losses(unbroken)] == list(range(1, STEPS + 1))
    records = read_metrics(unbroken)
    assert list(records[0]) == [
        "step", "tokens", "loss", "grad_norm", "lr", "step_time", "tokens_per_second", "mfu", "bubble_fraction", "data_wait_fraction",
        "peak_memory_bytes", "skipped_steps", "time",
    ]  # fmt: skip
    assert records[0]["tokens"] == 8 * 16
    assert records[0]["mfu"] is None, "the peak of this CPU is unknown"
    assert [record["step"] for record in records if "val_loss" in record] == [5, 10, 15, 20, 24]
    assert json.loads((unbroken / "status.json").read_text()) == {"state": "done", "step": STEPS, "error": None}
    checkpoints = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step-00000020", "step-00000024"], "checkpoint.keep=2"
    assert (unbroken / "checkpoints/latest").read_text().strip() == "step-00000024"
    assert (unbroken / ".hydra/overrides.yaml").is_file()
    assert (unbroken / "config.yaml").is_file()
    assert (unbroken / "logs/rank-0.log").is_file()
    assert [path.name for path in (unbroken / "traces").iterdir()] == ["step-00000005.json"], "train.trace_steps=[5]"


def test_the_loss_starts_at_chance_and_falls(unbroken: Path) -> None:
    run = losses(unbroken)
    assert run[0][1] == pytest.approx(4.16, abs=0.1), "ln 64 for 64 equally likely tokens"
    assert run[-1][1] < run[0][1]


@pytest.mark.parametrize(
    "layout", ["parallel=single model.dropout=0.1", "parallel=tp2_pp2 parallel.sequence_parallel=true model.dropout=0.1"]
)
def test_killed_in_mid_run_goes_on_bit_equal(layout: str, tmp_path: Path) -> None:
    """SIGKILL of everything, then the same command again: the losses are those of a run that was never killed."""
    longer = [*layout.split(), f"train.max_steps={4 * STEPS}", "train.eval_every=40"]  # so that the kill comes well before the end
    reference, run_dir = tmp_path / "reference", tmp_path / "run"
    assert command(tmp_path, *arguments(reference, *longer)).code == 0
    process = start_run(tmp_path, run_dir, *longer)
    wait_until(lambda: (run_dir / "checkpoints/latest").exists() and len(read_metrics(run_dir)) >= 10)
    kill_all(process, run_dir)
    killed_at = losses(run_dir)[-1][0]
    assert killed_at < 4 * STEPS, "it was to be killed before its end"
    outcome = command(tmp_path, *arguments(run_dir, *longer))
    assert outcome.code == 0, outcome.err
    assert "continues after" in outcome.out
    assert losses(run_dir) == losses(reference)


def test_killed_while_saving_loads_the_last_complete_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL while a checkpoint is being written, again and again: each start goes on from a complete one."""
    run_dir = tmp_path / "run"
    kills = 0
    for _ in range(4):
        before = {path.name for path in (run_dir / "checkpoints").glob("step-????????")}
        process = start_run(tmp_path, run_dir, "checkpoint.every=2")
        while process.poll() is None and not any((run_dir / "checkpoints").glob("*.partial/*")):
            time.sleep(0.001)
        if process.poll() is not None:
            break
        kill_all(process, run_dir)
        kills += 1
        for name in before:
            assert (run_dir / "checkpoints" / name / "state.json").is_file()
        for complete in (run_dir / "checkpoints").glob("step-????????"):
            assert (complete / "tensors.json").is_file()
    assert kills >= 2
    outcome = command(tmp_path, *arguments(run_dir))
    assert outcome.code == 0, outcome.err
    assert losses(run_dir) == losses(unbroken)
    assert not list((run_dir / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.num_layers=2"], "model.num_layers=2 differs from 4 of"),
        (["optimizer=sgd"], "optimizer.name=sgd differs from adamw of"),
        (["data.seq_len=8"], "data.seq_len=8 differs from 16 of"),
        (["checkpoint.resume=never"], "checkpoint.resume=never would overwrite"),
        (["checkpoint.resume=nowhere"], "checkpoint.resume=nowhere is no checkpoint folder"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(more: list[str], message: str, unbroken: Path) -> None:
    """Another model, optimizer or data in the same run folder; or a start that would overwrite what is there."""
    before = (unbroken / "metrics.jsonl").read_bytes()
    outcome = command(unbroken.parent, *arguments(unbroken, *more))
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_a_run_that_diverges_fails_and_saves_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = command(tmp_path, *arguments(run_dir, "optimizer=sgd", "optimizer.lr=1e30", "optimizer.grad_clip=null"))
    assert outcome.code == 1
    assert "training has diverged" in outcome.err
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert not list((run_dir / "checkpoints").glob("step-*"))


def test_another_layout_goes_on_from_the_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    """Saved by one process, resumed by tp2 x pp2: the losses go on as if nothing had changed."""
    first = tmp_path / "first"
    assert command(tmp_path, *arguments(first, "train.max_steps=10", "lr_schedule=constant")).code == 0
    second = tmp_path / "second"
    start = f"checkpoint.resume={first}/checkpoints/step-00000010"
    outcome = command(tmp_path, *arguments(second, "parallel=tp2_pp2", start, "lr_schedule=constant"))
    assert outcome.code == 0, outcome.err
    third = tmp_path / "third"
    assert command(tmp_path, *arguments(third, "lr_schedule=constant")).code == 0
    assert [step for step, _, _ in losses(second)] == list(range(11, STEPS + 1))
    for got, expected in zip(losses(second), losses(third)[10:], strict=True):
        assert got[1] == pytest.approx(expected[1], rel=1e-5)
        assert got[2] == pytest.approx(expected[2], rel=1e-4)


def test_the_same_text_is_written_by_every_layout(tmp_path: Path) -> None:
    """At its end the run prints what the model writes; the layout does not change a letter."""
    page = tmp_path / "text/page.txt"
    page.parent.mkdir()
    page.write_text("the cat sat on the mat. " * 200)
    texts = []
    memorize = ("data=memorize", "data.num_sequences", "data.vocab_size")
    more = ["data=text", f"data.path={page}", "model.vocab_size=257", "train.sample_tokens=60", "train.max_steps=10", "optimizer.lr=1e-2"]
    for layout in ("single", "tp2_pp2", "dp2"):
        run = [argument for argument in arguments(tmp_path / layout, f"parallel={layout}", *more) if not argument.startswith(memorize)]
        outcome = command(tmp_path, *run)
        assert outcome.code == 0, outcome.err
        texts.append(outcome.out.partition("The model writes:")[2].partition("done ")[0])
    assert len(texts[0].strip()) > 20
    assert texts[0] == texts[1] == texts[2]


def test_a_rank_that_raises_in_mid_step(tmp_path: Path) -> None:
    """The real trainer, an error planted in rank 1's third step: its traceback first, exit 1, nothing left."""
    plant = tmp_path / "plant/sitecustomize.py"
    plant.parent.mkdir()
    plant.write_text(
        "import sys, os\n"
        "if 'tptrain.launch' in ' '.join(sys.orig_argv) and os.environ.get('RANK') == '1':\n"
        "    import tptrain.trainer as t\n"
        "    real = t.Trainer._totals\n"
        "    def broken(self, *a):\n"
        "        if self.steps_done == 2: raise RuntimeError('planted in the step')\n"
        "        return real(self, *a)\n"
        "    t.Trainer._totals = broken\n"
    )
    run_dir = tmp_path / "run"
    line = [sys.executable, "-m", "tptrain", *arguments(run_dir, "parallel=tp2")]
    env = environment(PYTHONPATH=f"{plant.parent}:{Path.cwd()}")
    process = subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    outcome = finish(process)
    assert outcome.code == 1
    assert "rank 1" in outcome.err.splitlines()[0]
    assert "planted in the step" in outcome.err
    assert outcome.err.count("Traceback") == 1, "followers stay silent"
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert processes_of(run_dir) == []


def test_a_frozen_rank_is_named_within_the_time_limit(tmp_path: Path) -> None:
    """SIGSTOP in mid-step: its neighbours give up after launch.timeout_seconds, and the job says for whom it waited.

    A step has many micro-batches, so that the signal finds the ranks in the pipeline and not in the step's few sums over all of them.
    """
    run_dir, limit = tmp_path / "run", 5
    more = ["parallel=pp4", "parallel.schedule=zb_h1", "train.max_steps=100000", "checkpoint.every=0", "train.eval_every=0"]
    more.append("train.global_batch_size=256")
    process = start_run(tmp_path, run_dir, *more, f"launch.timeout_seconds={limit}")
    wait_until(lambda: len(read_metrics(run_dir)) > 3, seconds=90)
    frozen = 2
    pid = next(pid for pid, rank in ranks_of(process.pid, run_dir).items() if rank == frozen)
    os.kill(pid, signal.SIGSTOP)

    def named() -> list[str]:
        found = [json.loads(path.read_text()) for path in run_dir.glob("logs/rank-*.error.json")]
        return [record["error"] for record in found if record["waited_for"] == [frozen]]

    wait_until(named, seconds=100)
    os.kill(pid, signal.SIGCONT)  # so that the launcher can end it at once
    outcome = finish(process)
    assert any(f"from rank {frozen}" in error and "micro-batch" in error for error in named())
    assert outcome.code == 1
    assert f"from rank {frozen}: " in json.loads((run_dir / "status.json").read_text())["error"]


def ranks_of(parent: int, run_dir: Path) -> dict[int, int]:
    """The rank of each process that the command started, by process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = (folder / "cmdline").read_bytes().decode(), (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        rank = next((value.partition("=")[2] for value in variables if value.startswith("RANK=")), None)
        if str(run_dir) in line and rank is not None and int(folder.name) != parent:
            found[int(folder.name)] = int(rank)
    return found
