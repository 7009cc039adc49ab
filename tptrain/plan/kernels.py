"""How long a device takes for matrix products and for passes over memory.

A product [m, k] x [k, n] has 2 m n k FLOPs, done at

    large product's rate * d / (d + half),   d = min(m, n, k)

as thin matrices leave a part of the arithmetic units, or of a kernel's tile, idle. What adds, normalises, activates or updates does little
arithmetic and takes as long as its bytes need to and from memory. Each operation takes `kernel_seconds` besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tptrain.config import Config, refuse


class Product(NamedTuple):
    """Matrix products [m, k] x [k, n], all of one shape."""

    m: int
    n: int
    k: int
    times: float = 1
    """How many; a half where half of it is left out."""

    @property
    def flops(self) -> float:
        """Of all of them."""
        return 2.0 * self.m * self.n * self.k * self.times


@dataclass(frozen=True)
class Work:
    """What one rank computes in one go."""

    products: tuple[Product, ...] = ()
    bytes: float = 0.0
    """That passes over memory read and write."""
    kernels: float = 0.0
    """Operations."""

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.bytes + other.bytes, self.kernels + other.kernels)

    @property
    def flops(self) -> float:
        """Of its matrix products."""
        return sum(product.flops for product in self.products)


@dataclass(frozen=True)
class Device:
    """What computes."""

    flops_per_second: float
    """Of a large matrix product in the dtype to compute in."""
    bytes_per_second: float
    half_size: float = 0.0
    """The smallest dimension of a product that is half as fast as a large one."""
    kernel_seconds: float = 0.0

    def seconds(self, work: Work) -> float:
        """How long it takes."""
        return self.product_seconds(work.products) + work.bytes / self.bytes_per_second + work.kernels * self.kernel_seconds

    def product_seconds(self, products: Sequence[Product]) -> float:
        """The same of matrix products alone.

        >>> Device(1e12, 1e12, half_size=100).product_seconds([Product(100, 1000, 10_000)])
        0.004
        """
        return sum(product.flops * (1 + self.half_size / min(product[:3])) for product in products) / self.flops_per_second


def device_of(config: Config) -> Device:
    """The device of a config's hardware. Raises ConfigError where its speed is unknown."""
    hardware = config.hardware
    rate = hardware.matmul_flops_per_second
    if rate is None:
        key = "fp32_flops_per_second" if config.train.precision == "fp32" else "peak_flops_per_second"
        peak = getattr(hardware, key) or (hardware.fp32_flops_per_second if hardware.device == "cpu" else None)
        rate = _known(key, peak) * _known("matmul_efficiency", hardware.matmul_efficiency)
    bandwidth = _known("memory_bytes_per_second", hardware.memory_bytes_per_second)
    return Device(rate, bandwidth, hardware.matmul_half_size or 0.0, hardware.kernel_seconds or 0.0)


def _known(key: str, value: float | None) -> float:
    if value is None:
        rule = "is unknown, and a step's time depends on it"
        raise refuse(f"hardware.{key}", None, rule, "use hardware=h100 or another that says it, hardware=auto, which measures, or set it")
    return float(value)
