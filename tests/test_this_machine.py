"""hardware=auto for a plan: measured by ranks, remembered, and enough to price a step."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import small_config
from tptrain import environment, foresee, this_machine
from tptrain.config import Config, ConfigError
from tptrain.plan.pipeline import describe
from tptrain.plan.time import step_time
from tptrain.probe import measure


def automatic(**changes: Any) -> Config:
    return small_config(hardware__device="auto", **changes)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr("tptrain.launch.count_gpus", lambda: 0)
    return tmp_path / "this_machine.json"


def test_measures_with_two_ranks_and_remembers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "cores", lambda: 1)
    config = automatic(parallel__tp=2)
    filled = this_machine.measured(config, 2)
    hardware = filled.hardware
    assert hardware.device == "cpu"
    assert 1e8 < hardware.matmul_flops_per_second < 1e13
    assert 1e7 < hardware.memory_bytes_per_second < 1e12
    assert 1e6 < hardware.node_bytes_per_second < 1e12
    assert 1e-7 < hardware.node_latency_seconds < 1
    assert step_time(filled, describe(filled)).tokens_per_second > 0
    (known,) = json.loads(cache.read_text()).values()
    assert known["measured"]["ranks"] == 2

    monkeypatch.setattr(this_machine, "_measure", lambda config: pytest.fail("measured again within a day"))
    assert this_machine.measured(config, 2).hardware == hardware
    assert this_machine.measured(config, 3) is config, "more than two ranks a core"

    monkeypatch.setattr(this_machine, "_measure", lambda config: known["measured"] | {"memory_bytes": 1.0})
    known["time"] -= 2 * 86_400
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: known}))
    assert this_machine.measured(config, 2).hardware.memory_bytes == 1.0, "a day old"
    cache.write_text("torn")
    assert this_machine.measured(config, 2).hardware.memory_bytes == 1.0


def test_one_process_has_no_links(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []

    def alone(config: Config) -> dict[str, Any]:
        asked.append(config)
        return {
            "device": "cpu", "ranks": 1,
            "matmul_flops_per_second": {"fp32": 1e11, "bf16": 1e11}, "matmul_half_size": {"fp32": 0, "bf16": 0},
            "memory_bytes_per_second": 1e10, "kernel_seconds": 1e-5, "memory_bytes": 1e10,
        }  # fmt: skip

    monkeypatch.setattr(this_machine, "_measure", alone)
    filled = this_machine.measured(automatic(), 1)
    assert (asked[0].parallel.tp, asked[0].processes, filled.hardware.node_bytes_per_second) == (1, 1, None)
    assert step_time(filled, describe(filled)).step_seconds > 0


def test_a_window_lasts_from_the_first_start_to_the_last_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair:
        """Another rank that begins a quarter of a second earlier and ends as much later."""

        def wait(self) -> None:
            pass

        def largest(self, value: float) -> float:
            return value + 0.25

        def smallest(self, value: float) -> float:
            return value - 0.25

    seconds = iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(seconds)))
    import torch

    assert measure._seconds_each(lambda: None, torch.device("cpu"), Pair()) == 1.5  # type: ignore[arg-type]


def test_the_plan_measures_where_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """hardware=auto alone is measured, for the layout's ranks, or for the devices that are searched."""
    asked: list[int] = []

    def measured(config: Config, ranks: int) -> Config:
        asked.append(ranks)
        return config

    monkeypatch.setattr(this_machine, "measured", measured)
    for changes in ({"hardware__device": "cpu"}, {"hardware__device": "auto", "parallel__schedule": "nope.txt"}):
        with contextlib.suppress(ConfigError):
            foresee.plan(small_config(**changes, plan__pictures=False), tmp_path, [])
    assert asked == []
    foresee.plan(automatic(parallel__tp=2, plan__pictures=False), tmp_path, [])
    with pytest.raises(ConfigError, match="memory_bytes"):
        foresee.plan(automatic(hardware__devices=4, plan__pictures=False), tmp_path, [])
    assert asked == [2, 4]
