"""A sweep: every job has a folder, a row and a line of the file, whatever became of it; and none shares ranks or folders with another."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from yaml import safe_load

from tests.command import FAULTS, command, finish, processes_of, start, wait_until
from tptrain import cli
from tptrain.config import resolve
from tptrain.stop import AGAIN
from tptrain.sweep.draw import axes_of, picture
from tptrain.sweep.results import JobResult, collect, exit_code

SMALL = (
    "experiment=memorize", "model.hidden_size=32", "model.num_layers=2", "model.ffn_hidden_size=64", "wandb=disabled",
    "train.log_every=1", "train.eval_every=0", "train.eval_steps=1", "launch.timeout_seconds=600",
)  # fmt: skip


def _status(folder: Path) -> dict:
    try:
        return json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def _pids(folder: Path) -> list[int]:
    """The ranks that work in a run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "tptrain.launch" in words and str(folder) in words:
            found.append(int(path.parent.name))
    return found


def test_six_jobs_of_which_one_is_refused_and_one_is_killed(tmp_path: Path):
    process = start(tmp_path, *SMALL, "-m", "parallel=tp2", "train.max_steps=2,-1,3,100000,4,5", "hydra.sweep.dir=sweep")
    sweep = tmp_path / "sweep"
    wait_until(lambda: (_status(sweep / "3").get("step") or 0) >= 2, seconds=500)
    ranks = _pids(sweep / "3")
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    outcome = finish(process)
    assert outcome.code == 1
    wait_until(lambda: not processes_of(tmp_path), seconds=30)

    rows = _rows(sweep)
    assert [row["train.max_steps"] for row in rows] == ["2", "-1", "3", "100000", "4", "5"]
    assert [row["status"] for row in rows] == ["done", "refused", "done", "failed", "done", "done"]
    assert rows[1]["error"].startswith("train.max_steps=-1 ")
    assert "was killed by SIGKILL" in rows[3]["error"]
    assert sorted(row["folder"] for row in rows) == [f"sweep/{number}" for number in range(6)]
    for row in rows:
        folder = tmp_path / row["folder"]
        assert f"train.max_steps={row['train.max_steps']}" in safe_load((folder / ".hydra" / "overrides.yaml").read_text())
        if row["status"] != "done":
            assert row["loss"] == row["val_loss"] == row["tokens_per_second"] == ""
            continue
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if "loss" in record]
        assert [record["step"] for record in steps] == list(range(1, int(row["train.max_steps"]) + 1))
        assert int(row["step"]) == len(steps)
        assert float(row["loss"]) == steps[-1]["loss"]
        assert float(row["val_loss"]) == [record for record in records if "val_loss" in record][-1]["val_loss"]
        speeds = [record["tokens_per_second"] for record in steps if record["tokens_per_second"] is not None]
        assert float(row["tokens_per_second"]) == statistics.median(speeds)
        assert f"{float(row['loss']):.4f}" in outcome.out
    assert "6 jobs: 4 done, 1 refused, 1 failed" in outcome.out
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_signal_stops_the_job_starts_no_other_and_leaves_the_table(tmp_path: Path):
    arguments = ("experiment=memorize", "wandb=disabled", "-m", "train.max_steps=2,5000,3", "hydra.sweep.dir=sweep")
    process = start(tmp_path, *arguments, PYTHONPATH=str(FAULTS))
    wait_until(lambda: (_status(tmp_path / "sweep" / "1").get("step") or 0) >= 3, seconds=300)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.code == AGAIN
    assert [row["status"] for row in _rows(tmp_path / "sweep")] == ["done", "stopped", "waiting"]
    assert not (tmp_path / "sweep" / "2").exists()
    assert processes_of(tmp_path) == []


def test_two_jobs_at_a_time_do_not_mix_and_stop_together(tmp_path: Path):
    """The stand-in fails where it meets ranks of another job: it adds up who is there."""
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep", "launch.threads_per_rank=1")
    arguments = ("experiment=memorize", "wandb=disabled", "-m", *launcher, "parallel=tp2", "train.max_steps=5000,5001,3")
    process = start(tmp_path, *arguments, PYTHONPATH=str(FAULTS))
    folders = [tmp_path / "sweep" / str(number) for number in range(3)]
    wait_until(lambda: all((_status(folder).get("step") or 0) >= 3 for folder in folders[:2]), seconds=400)
    ranks = [set(_pids(folder)) for folder in folders[:2]]
    assert [len(pids) for pids in ranks] == [2, 2]
    assert not ranks[0] & ranks[1]
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.code == AGAIN
    assert [row["status"] for row in _rows(tmp_path / "sweep")] == ["stopped", "stopped", "waiting"]
    assert _pids(folders[0]) == _pids(folders[1]) == _pids(folders[2]) == []


@pytest.mark.parametrize("preset", sorted(path.stem for path in (cli.CONF / "sweep").glob("*.yaml")))
def test_a_preset_makes_several_jobs_that_can_run(preset: str):
    params = safe_load((cli.CONF / "sweep" / f"{preset}.yaml").read_text())["hydra"]["sweeper"]["params"]
    overrides = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()])
    for override in overrides:
        values = list(override.sweep_string_iterator())
        assert len(set(values)) > 1
        for value in values:
            resolve(cli.compose([f"sweep={preset}", f"{override.key_or_group}={value}"]))


def test_a_preset_needs_no_flag(tmp_path: Path):
    outcome = command(tmp_path, "sweep=layouts", "parallel=single,pp2", "train.max_steps=-1", "hydra.sweep.dir=sweep")
    assert outcome.code == 2, "every job is refused"
    rows = _rows(tmp_path / "sweep")
    assert [row["parallel"] for row in rows] == ["single", "pp2"], "the command line wins over the preset"
    assert {row["status"] for row in rows} == {"refused"}


def test_jobs_cannot_share_a_folder(tmp_path: Path):
    outcome = command(tmp_path, "-m", "seed=1,2", "hydra.sweep.subdir=same", "hydra.sweep.dir=sweep")
    assert outcome.code == 2
    assert outcome.err.startswith("tptrain: hydra.sweep.subdir=same is the same folder for all jobs: use ")


# ---- from folders ------------------------------------------------------------------------------------------


def _job(sweep: Path, number: int, overrides: list[str], **status: object) -> None:
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  job:\n    num: {number}\n")
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    if status:
        (folder / "status.json").write_text(json.dumps(status))


def test_jobs_of_an_earlier_sweep_in_the_same_folder_are_left_out(tmp_path: Path):
    _job(tmp_path, 0, ["seed=1"], state="done", step=3, error=None)
    _job(tmp_path, 1, ["seed=7"], state="done", step=3, error=None)
    _job(tmp_path, 2, ["seed=3"], state="failed", step=1, error="refused: no")
    planned = [["seed=1"], ["seed=2"]]
    assert [(job.number, job.status) for job in collect(tmp_path, planned)] == [(0, "done"), (1, "waiting")]
    assert [(job.number, job.status) for job in collect(tmp_path, None)] == [(0, "done"), (1, "done"), (2, "refused")]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["done", "done"], 0),
        (["done", "failed", "stopped"], 1),
        (["done", "refused"], 1),
        (["refused", "refused"], 2),
        (["done", "stopped"], AGAIN),
        (["done", "running"], 1),
    ],
)
def test_the_exit_code(states: list[str], code: int):
    assert exit_code([JobResult(number, {}, state) for number, state in enumerate(states)], AGAIN) == code


def _grid(*pairs: tuple[str, str]) -> list[JobResult]:
    keys = ("optimizer.lr", "parallel")
    return [JobResult(n, dict(zip(keys, pair, strict=True)), "done", 5, 2.0 + n, 2.5 + n, 100.0) for n, pair in enumerate(pairs)]


def test_numbers_lie_along_x_and_the_other_key_chooses_the_colour():
    both = _grid(("1e-4", "tp2"), ("1e-4", "pp2"), ("1e-3", "tp2"), ("1e-3", "pp2"))
    assert axes_of(both) == ("optimizer.lr", "parallel")
    assert axes_of(both[::2]) == ("optimizer.lr", None)
    assert axes_of(both[:2]) == ("parallel", None)
    for jobs in (both, both[::2], both[:2], both[:1], [*both[:2], JobResult(2, {"parallel": "single"}, "failed")]):
        assert (picture(jobs) or b"").startswith(b"\x89PNG")
    assert picture([JobResult(0, {}, "failed")]) is None
