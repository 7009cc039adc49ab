"""The verb `plan` as people type it: a search of a cluster, the files that it leaves."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.command import command
from tptrain.cli import compose
from tptrain.config import resolve
from tptrain.foresee import fixed_keys
from tptrain.plan.memory import rank_memory
from tptrain.plan.pipeline import describe
from tptrain.plan.time import step_time

CLUSTER = [
    "model=gpt_175b", "hardware=h100", "hardware.devices=1024", "train.global_batch_size=1536", "train.precision=bf16",
    "plan.tokens=300e9", "hardware.dollars_per_device_hour=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str, dict[str, Any]]:
    """The run folder of a search, its stdout's lines, its stderr, its plan.json."""
    folder = tmp_path_factory.mktemp("cluster")
    outcome = command(folder, "plan", *CLUSTER, "hydra.run.dir=here", "plan.best=4")
    assert outcome.code == 0, outcome.err
    return folder / "here", outcome.out.splitlines(), outcome.err, json.loads((folder / "here" / "plan.json").read_text())


def test_the_best_of_a_cluster_can_run_there(searched: tuple[Path, list[str], str, dict[str, Any]]) -> None:
    """Each as the overrides that stand on stdout, by itself, priced in full."""
    _, lines, _, found = searched
    best = found["search"]["best"]
    assert [each["overrides"] for each in best] == lines
    assert len(lines) == 4
    speeds = []
    for line, told in list(zip(lines, best, strict=True))[:2]:
        config = resolve(compose([*CLUSTER, *line.split()]))
        assert config.processes == 1024
        assert config.batch_size == 1536 == config.parallel.micro_batches * config.parallel.micro_batch_size * int(config.parallel.dp)
        assert 8 % config.parallel.tp == 0, "a node has eight devices"
        assert 96 % config.parallel.tp == 0
        assert config.parallel.num_stages <= 96
        pipeline = describe(config)
        memory, time = rank_memory(config, pipeline), step_time(config, pipeline)
        assert max(rank.total for rank in memory) == told["memory_bytes"] <= 80e9
        assert time.step_seconds == pytest.approx(told["step_seconds"], rel=1e-12)
        assert told["tokens_per_second"] == pytest.approx(1536 * 2048 / time.step_seconds)
        speeds.append(time.tokens_per_second)
    assert speeds == sorted(speeds, reverse=True)
    days = 300e9 / best[0]["tokens_per_second"] / 86400
    assert found["training_days"] == pytest.approx(days)
    assert found["training_dollars"] == pytest.approx(days * 24 * 1024 * 2)


def test_every_layout_is_on_record(searched: tuple[Path, list[str], str, dict[str, Any]]) -> None:
    *_, err, found = searched
    table = found["search"]["layouts"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert f"{len(rows):,} layouts" in err
    assert all(row["tp"] * row["pp"] * row["dp"] == 1024 for row in rows)
    for row in rows:
        assert row["missing_bytes_at_least"] == max(0, row["memory_bytes_at_least"] - 80e9)
        assert row["step_seconds"] is None or row["step_seconds"] >= row["step_seconds_at_least"]
    slowest = found["search"]["best"][-1]["step_seconds"]
    simulated = [row["step_seconds"] for row in rows if row["step_seconds"] is not None]
    assert sorted(simulated)[:4] == [each["step_seconds"] for each in found["search"]["best"]]
    assert all(row["step_seconds_at_least"] >= slowest for row in rows if not row["missing_bytes_at_least"] and row["step_seconds"] is None)


def test_pictures_and_the_last_line(searched: tuple[Path, list[str], str, dict[str, Any]]) -> None:
    folder, _, err, _ = searched
    names = ["plan.json", "plots/plan_memory.png", "plots/plan_timeline.png", "plots/plan_layouts.png"]
    assert err.splitlines()[-1] == f"written     {' '.join(names)} in here"
    for name in names[1:]:
        data = (folder / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert 800 <= width <= 4200, name
        assert 300 <= height <= 4200, name


def test_one_layout_on_record(tmp_path: Path) -> None:
    """Units in the names, sums that add up, null for what is unknown."""
    layout = ["parallel=tp2_pp2_dp2", "hardware=cpu", "hydra.run.dir=here", "plan.pictures=false"]
    outcome = command(tmp_path, "plan", *layout)
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "here" / "plan.json").read_text())
    assert found["version"] == 1
    assert (found["missing_bytes"], found["mfu"], found["training_dollars"]) == (None, None, None)
    assert [rank["pp_rank"] for rank in found["memory"]] == [0, 1]
    for rank in found["memory"]:
        parts = [size for key, size in rank.items() if key.endswith("_bytes") and key != "total_bytes"]
        assert sum(parts) == rank["total_bytes"] > 0
    assert sum(found["step_seconds_by_part"].values()) == pytest.approx(found["step_seconds"])
    assert found["tokens_per_second"] == pytest.approx(
        found["layout"]["global_batch_size"] * found["sequence_tokens"] / found["step_seconds"]
    )
    assert {call["group"] for call in found["communication"]} == {"tp", "dp", "pp_up", "pp_down", "embedding", "world"}
    assert not (tmp_path / "here" / "plots").exists()


def test_keys_on_the_command_line_stay() -> None:
    given = ["parallel=tp2_pp2", "parallel.recompute=full", "+parallel.tp=4", "parallel.stages_per_rank=auto", "train.max_steps=3"]
    config = compose([override.lstrip("+") for override in given])
    assert fixed_keys(config, given) == {"tp": 4, "recompute": "full"}
