"""What a measurement means for the config: the fit of a rate, and which keys it fills."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tptrain.config import HardwareConfig
from tptrain.probe.record import Measured, fit_rate, measured_from

FOUND = Measured("cpu", 2, {"fp32": 1e11, "bf16": 4e11}, {"fp32": 16.0, "bf16": 0.0}, 8e9, 1e-5, 1e10, 1e9, 1e-4)
OPEN = HardwareConfig(device="auto", peak_flops_per_second=None)


@pytest.mark.parametrize(("rate", "half"), [(1e11, 0.0), (1e12, 40.0), (5e14, 128.0)])
def test_fit_finds_the_curve(rate: float, half: float) -> None:
    sizes = [32.0, 128.0, 512.0]
    found = fit_rate(sizes, [(1 + half / size) / rate for size in sizes])
    assert found == (pytest.approx(rate), pytest.approx(half, abs=1e-6))


def test_fit_where_thin_products_are_no_slower() -> None:
    rate, half = fit_rate([32.0, 128.0, 512.0], [0.9e-11, 1e-11, 1.1e-11])
    assert half == 0
    assert 0.9e11 < rate < 1.12e11


def test_fills_what_is_open() -> None:
    filled = FOUND.fill(OPEN, "fp32")
    assert (filled.device, filled.matmul_flops_per_second, filled.matmul_half_size) == ("cpu", 1e11, 16.0)
    assert (filled.memory_bytes_per_second, filled.kernel_seconds, filled.memory_bytes) == (8e9, 1e-5, 1e10)
    assert (filled.node_bytes_per_second, filled.node_latency_seconds, filled.devices_per_node) == (1e9, 1e-4, None)
    assert filled.peak_flops_per_second is None, "MFU stays null"
    assert FOUND.fill(OPEN, "bf16").matmul_flops_per_second == 4e11
    assert replace(FOUND, device="cuda").fill(OPEN, "fp32").devices_per_node == 2


def test_keeps_what_is_named() -> None:
    assert FOUND.fill(replace(OPEN, memory_bytes=5e9), "fp32").memory_bytes == 5e9


def test_there_and_back_by_json() -> None:
    assert measured_from(json.loads(json.dumps(FOUND.to_dict()))) == FOUND
