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

UNKNOWN = "hardware.device=cpu"
"""The default hardware, but not measured: nothing is known of its speed."""


def test_the_schedule_goes_to_stdout_and_the_stages_to_stderr(tmp_path: Path) -> None:
    layout = ["parallel=pp4", "parallel.schedule=gpipe", "parallel.micro_batches=2", "model.num_layers=8"]
    outcome = command(tmp_path, "plan", *layout, UNKNOWN)
    assert outcome.code == 0, outcome.err
    schedule = [f"{rank}F0 {rank}F1 {rank}B0 {rank}B1" for rank in range(4)]
    assert outcome.out.splitlines() == ["# parallel.pp=4 parallel.stages_per_rank=1 parallel.micro_batches=2", *schedule]
    assert "layout      tp 1 x pp 4 x dp 1 = 4 processes\n" in outcome.err
    rows = [re.split(r"\s*[│|]\s*", line)[1:-1] for line in outcome.err.splitlines() if re.match(r"[│|]", line)]
    assert [row[:3] for row in rows[:4]] == [["0", "0", "0-1"], ["1", "1", "2-3"], ["2", "2", "4-5"], ["3", "3", "6-7"]]
    assert sum(float(row[4].rstrip(" %")) for row in rows[:4]) == pytest.approx(100, abs=0.2), "each rounded to 0.1"
    assert "activations at most 2 2 2 2 live" in outcome.err
    assert "whether that fits is unknown: set hardware.memory_bytes" in outcome.err
    assert "step        unknown, as hardware.fp32_flops_per_second=null is unknown" in outcome.err
    (folder,) = (tmp_path / "outputs").glob("*/*")
    last = outcome.err.splitlines()[-1]
    assert last == f"written     plan.json plots/plan_memory.png in {folder.relative_to(tmp_path)}"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*") if ".hydra" not in path.parts} == set(last.split()[1:3])


def pipeline_lines(said: str) -> list[str]:
    """What is said of stages and schedule."""
    stages, _, rest = said.partition("memory of a rank")
    return [*stages.splitlines(), *(line for line in rest.splitlines() if line.startswith(("layout", "schedule", "bubble", "activations")))]


@pytest.mark.parametrize("schedule", ["zb_h1", "zb_v", "interleaved"])
def test_what_it_writes_is_a_schedule_file(tmp_path: Path, schedule: str) -> None:
    """`plan > mine.txt` gives what `parallel.schedule=mine.txt` takes with the keys that stand in it: the same schedule, the same plan."""
    layout = [
        "parallel=pp2",
        "parallel.micro_batches=6",
        "hydra.run.dir=here",
        "plan.pictures=false",
        UNKNOWN,
        f"parallel.stages_per_rank={1 if schedule == 'zb_h1' else 2}",
    ]
    first = command(tmp_path, "plan", *layout, f"parallel.schedule={schedule}")
    (tmp_path / "mine.txt").write_text(first.out)
    keys = first.out.splitlines()[0].removeprefix("# ").split()
    again = command(tmp_path, "plan", *keys, "parallel.schedule=mine.txt", "hydra.run.dir=here", "plan.pictures=false", UNKNOWN)
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert again.out == first.out
    assert pipeline_lines(again.err) == pipeline_lines(first.err.replace(schedule, "mine.txt"))
    layout = [override for override in layout if not override.startswith("hydra")]
    assert loads(first.out) == describe(resolve(compose([*layout, f"parallel.schedule={schedule}"]))).schedule
    if schedule != "zb_v":  # which is made for the costs of the stages
        assert loads(first.out) == SCHEDULES[schedule](2, 1 if schedule == "zb_h1" else 2, 6)


def test_refused_in_one_line(tmp_path: Path) -> None:
    for arguments, message in {
        ("parallel.tp=3",): "parallel.tp=3 does not divide model.num_heads=4: use 1, 2 or 4",
        ("parallel.pp=9",): "parallel.pp=9 needs a layer a stage",
        ("parallel.schedule=nope.txt",): "parallel.schedule=nope.txt is no file",
        ("hardware.devices=4",): "train.global_batch_size=null makes the batch follow from the layout",
        ("hardware=cpu", "hardware.devices=4", "train.global_batch_size=8"): "hardware.memory_bytes=null is unknown",
        ("hardware=h100", "hardware.devices=7", "train.global_batch_size=8"): "hardware.devices=7 has no layout, as",
        ("hardware=h100", "hardware.devices=2", "train.global_batch_size=8", "hardware.memory_bytes=1e6"): "hardware.devices=2 has ",
    }.items():
        outcome = command(tmp_path, "plan", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"tptrain: {message}")
        assert outcome.err.count("\n") == 1
        assert not [path for path in tmp_path.rglob("*") if path.name != "outputs"], "no run folder"


def test_refused_under_a_launcher(tmp_path: Path) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    outcome = command(tmp_path, "plan", "parallel.pp=2", **variables)
    assert (outcome.code, outcome.out) == (2, "")
    assert "run it without torchrun" in outcome.err


def test_no_torch_is_imported(tmp_path: Path) -> None:
    script = """
import json, sys
from tptrain.cli import main
sys.argv = ["tptrain", "plan", "parallel=tp8_pp8", "model=gpt_175b", "plan.pictures=false", "hardware.device=cpu"]
try:
    main()
finally:
    print(json.dumps([name for name in ("torch", "datasets", "wandb", "numpy", "matplotlib") if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
