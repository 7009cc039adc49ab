"""The verb `plan`: what goes to stdout and to stderr, and what is left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import command, environment
from tptrain.cli import compose
from tptrain.config import resolve
from tptrain.pipeline.notation import loads
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.plan.pipeline import describe


def test_the_schedule_goes_to_stdout_and_the_stages_to_stderr(tmp_path: Path) -> None:
    outcome = command(tmp_path, "plan", "parallel=pp4", "parallel.schedule=gpipe", "parallel.micro_batches=2", "model.num_layers=8")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [f"{rank}F0 {rank}F1 {rank}B0 {rank}B1" for rank in range(4)]
    rows = [re.split(r"\s*[│|]\s*", line)[1:-1] for line in outcome.err.splitlines() if re.match(r"[│|]", line)]
    assert [row[:3] for row in rows] == [["0", "0", "0-1"], ["1", "1", "2-3"], ["2", "2", "4-5"], ["3", "3", "6-7"]]
    assert sum(float(row[4].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.2), "each rounded to 0.1"
    assert "activations at most 2 2 2 2 live" in outcome.err
    assert not list(tmp_path.iterdir()), "no run folder"


@pytest.mark.parametrize("schedule", ["zb_h1", "zb_v", "interleaved"])
def test_what_it_writes_is_a_schedule_file(tmp_path: Path, schedule: str) -> None:
    """`plan > mine.txt` gives what `parallel.schedule=mine.txt` takes: the same schedule, the same plan."""
    layout = ["parallel=pp2", "parallel.micro_batches=6", f"parallel.stages_per_rank={1 if schedule == 'zb_h1' else 2}"]
    first = command(tmp_path, "plan", *layout, f"parallel.schedule={schedule}")
    (tmp_path / "mine.txt").write_text(first.out)
    again = command(tmp_path, "plan", *layout, "parallel.schedule=mine.txt")
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert again.out == first.out
    assert again.err == first.err.replace(schedule, "mine.txt")
    assert loads(first.out) == describe(resolve(compose([*layout, f"parallel.schedule={schedule}"]))).schedule
    if schedule != "zb_v":  # which is made for the costs of the stages
        assert loads(first.out) == SCHEDULES[schedule](2, 1 if schedule == "zb_h1" else 2, 6)


def test_refused_in_one_line(tmp_path: Path) -> None:
    for arguments, message in {
        ("parallel.tp=3",): "parallel.tp=3 does not divide model.num_heads=4: use 1, 2 or 4",
        ("parallel.pp=9",): "parallel.pp=9 needs a layer a stage",
        ("parallel.schedule=nope.txt",): "parallel.schedule=nope.txt is no file",
        ("-m", "seed=1,2"): "-m starts one job after another, but this verb has no run folders",
    }.items():
        outcome = command(tmp_path, "plan", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"tptrain: {message}")
        assert outcome.err.count("\n") == 1
        assert not list(tmp_path.iterdir())


def test_refused_under_a_launcher(tmp_path: Path) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    outcome = command(tmp_path, "plan", "parallel.pp=2", **variables)
    assert (outcome.code, outcome.out) == (2, "")
    assert "run it without torchrun" in outcome.err


def test_no_torch_is_imported(tmp_path: Path) -> None:
    script = """
import json, sys
from tptrain.cli import main
sys.argv = ["tptrain", "plan", "parallel=tp8_pp8", "model=gpt_175b"]
try:
    main()
finally:
    print(json.dumps([name for name in ("torch", "datasets", "wandb", "numpy", "matplotlib") if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
