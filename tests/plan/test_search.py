"""The search for the best layouts, against all layouts priced in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import small_config
from tptrain.config import Config, ConfigError
from tptrain.plan.layouts import Layout, Layouts
from tptrain.plan.memory import rank_memory
from tptrain.plan.pipeline import describe
from tptrain.plan.prices import Prices
from tptrain.plan.search import Found, search
from tptrain.plan.time import step_time

HARDWARE: dict[str, Any] = {
    "hardware__device": "cuda", "hardware__fp32_flops_per_second": 2e11, "hardware__peak_flops_per_second": 4e11,
    "hardware__memory_bytes_per_second": 1e10, "hardware__memory_bytes": 1e6, "hardware__devices_per_node": 4,
    "hardware__node_bytes_per_second": 2e9, "hardware__node_latency_seconds": 2e-6, "hardware__network_bytes_per_second": 5e8,
    "hardware__network_latency_seconds": 1e-5, "hardware__matmul_efficiency": 0.8,
}  # fmt: skip
"""Devices on which computation, links and memory all matter to a small model."""


def planned(**changes: Any) -> Config:
    return small_config(**{"model__num_layers": 6, "train__global_batch_size": 12, "train__precision": "bf16"} | HARDWARE | changes)


@dataclass
class Case:
    """A search, and every layout by itself as `tptrain plan` prices it: bytes of the fullest rank and seconds of a step."""

    config: Config
    devices: int
    full: dict[Layout, tuple[float, float]]


@pytest.fixture(scope="module", params=[4, 8])
def case(request: pytest.FixtureRequest) -> Case:
    config, devices = planned(), request.param
    layouts, full = Layouts(config, devices), {}
    for layout in list(layouts)[:: devices // 4]:
        its = layouts.config(layout)
        pipeline = describe(its)
        full[layout] = (max(rank.total for rank in rank_memory(its, pipeline)), step_time(its, pipeline).step_seconds)
    sizes = sorted(size for size, _ in full.values())
    config.hardware.memory_bytes = sizes[len(sizes) // 2]  # so that half of them fit
    return Case(config, devices, full)


def test_what_is_left_out_is_no_better(case: Case) -> None:
    """Of each number of layouts asked for, the same ones as by pricing all."""
    if case.devices != 4:
        pytest.skip("not all were priced")
    fitting = sorted(seconds for size, seconds in case.full.values() if size <= (case.config.hardware.memory_bytes or 0))
    assert 100 < len(fitting) < len(case.full) - 100, "the memory must matter"
    for count in (1, 10, len(fitting) + 1):
        case.config.plan.best = count
        found = search(case.config, case.devices)
        assert [each.time.step_seconds for each in found.best] == pytest.approx(fitting[:count], rel=1e-12)
        for each in found.best:
            assert (each.memory_bytes, each.time.step_seconds) == pytest.approx(case.full[each.layout], rel=1e-12)
        simulated = sum(each.step_seconds is not None for each in found.candidates)
        assert simulated <= len(fitting)
        assert count > 1 or simulated < len(fitting) / 4, "the bound is there to spare simulations"


def test_first_sight_promises_too_little_and_never_too_much(case: Case) -> None:
    layouts = Layouts(case.config, case.devices)
    prices = Prices(layouts)
    shares = []
    for layout, (size, seconds) in case.full.items():
        its = layouts.config(layout)
        assert prices.least_bytes(layout, its) <= size, layout
        assert prices.bytes_of_fullest(layout, its) == size, layout
        least = prices.least_seconds(layout, its) + prices.outside_seconds(layout, its)
        assert least <= seconds * (1 + 1e-12), layout
        shares.append(least / seconds)
    assert sum(shares) / len(shares) > 0.9, "else it would spare little"


def test_what_does_not_fit_is_marked(case: Case) -> None:
    found = search(case.config, case.devices)
    unfitting = {each.layout for each in found.unfitting}
    assert unfitting
    for layout, (size, _) in case.full.items():
        assert layout not in unfitting or size > found.device_bytes
    for each in found.unfitting:
        if each.layout in case.full:
            assert 0 < each.missing_bytes(found.device_bytes) <= case.full[each.layout][0] - found.device_bytes


def test_none_fits(case: Case) -> None:
    """Then the one that needs least is named, exactly."""
    if case.devices != 4:
        pytest.skip("not all were priced")
    found: Found = search(planned(hardware__memory_bytes=1000.0), case.devices)
    assert found.best == []
    assert found.nearest is not None
    assert found.nearest.memory_bytes == min(size for size, _ in case.full.values())
    assert case.full[found.nearest.layout][0] == found.nearest.memory_bytes


def test_unknown_hardware_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^hardware.memory_bytes=null is unknown, .*: set it, or use hardware=h100"):
        search(planned(hardware__memory_bytes=None), 4)
    for key in ("memory_bytes_per_second", "node_bytes_per_second", "network_latency_seconds", "matmul_efficiency"):
        with pytest.raises(ConfigError, match=rf"^hardware.{key}=null is unknown"):
            search(planned(**{f"hardware__{key}": None}), 8)
