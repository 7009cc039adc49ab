"""What was measured of this machine, and what it means for the group `hardware`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tptrain.config import HardwareConfig


@dataclass(frozen=True)
class Measured:
    """One device, while all that were to share the machine worked."""

    device: str
    """cpu or cuda."""
    ranks: int
    """How many worked at once."""
    matmul_flops_per_second: dict[str, float]
    """Of a large product, by fp32 and bf16."""
    matmul_half_size: dict[str, float]
    memory_bytes_per_second: float
    kernel_seconds: float
    memory_bytes: float
    node_bytes_per_second: float | None = None
    """Between the ranks; None where there was one."""
    node_latency_seconds: float | None = None
    """Of one message of a ring."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def fill(self, hardware: HardwareConfig, precision: str) -> HardwareConfig:
        """The group with what it leaves open. precision: what will be computed in. Where it names a value, that stays."""
        found: dict[str, Any] = {
            "matmul_flops_per_second": self.matmul_flops_per_second[precision],
            "matmul_half_size": self.matmul_half_size[precision] or None,
            "devices_per_node": self.ranks if self.device == "cuda" else None,
        }
        for key in ("memory_bytes_per_second", "kernel_seconds", "memory_bytes", "node_bytes_per_second", "node_latency_seconds"):
            found[key] = getattr(self, key)
        return replace(hardware, device=self.device, **{key: value for key, value in found.items() if getattr(hardware, key) is None})


def measured_from(content: Mapping[str, Any]) -> Measured:
    """Back from JSON."""
    return Measured(**content)


def fit_rate(sizes: Sequence[float], seconds_per_flop: Sequence[float]) -> tuple[float, float]:
    """The rate of a large product, and the smallest dimension at which a product has half of it.

    The least squares of seconds a FLOP = (1 + half/d) / rate over smallest dimensions d, relative to what was measured.

    >>> rate, half = fit_rate([10, 1000], [(1 + 50 / 10) / 1e9, (1 + 50 / 1000) / 1e9])
    >>> round(rate / 1e9, 6), round(half, 6)
    (1.0, 50.0)
    """
    weights = [1 / seconds**2 for seconds in seconds_per_flop]
    inverse = [1 / size for size in sizes]
    whole = sum(weights)
    x = sum(w * i for w, i in zip(weights, inverse, strict=True)) / whole
    y = sum(w * s for w, s in zip(weights, seconds_per_flop, strict=True)) / whole
    spread = sum(w * (i - x) ** 2 for w, i in zip(weights, inverse, strict=True))
    slope = sum(w * (i - x) * (s - y) for w, i, s in zip(weights, inverse, seconds_per_flop, strict=True)) / spread if spread else 0.0
    base = y - slope * x
    if slope <= 0 or base <= 0:  # thin products are no slower, or noise: one rate for all
        return 1 / y, 0.0
    return 1 / base, slope / base
