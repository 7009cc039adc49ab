"""The schema of the group `hardware`, and the checks of its own values.

Training reads the device and its peak; the rest is for `tptrain plan`. What is null is unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tptrain.config_error import refuse


@dataclass
class HardwareConfig:
    """What the ranks run on, and what joins them."""

    device: str
    """auto (cuda where there is one, else cpu), cpu or cuda."""
    peak_flops_per_second: float | None
    """The device's dense bf16 peak, for MFU; null means unknown, and so is MFU."""
    fp32_flops_per_second: float | None = None
    """Its peak where train.precision=fp32."""
    memory_bytes: float | None = None
    """Memory of a device."""
    memory_bytes_per_second: float | None = None
    """Bandwidth of that memory."""
    devices: int | None = None
    """Devices to plan for: `tptrain plan` searches the layouts of so many; null means those that the layout of `parallel` needs."""
    devices_per_node: int | None = None
    """Devices of one machine."""
    node_bytes_per_second: float | None = None
    """What a device sends to others of its machine, one way."""
    node_latency_seconds: float | None = None
    """Of one message inside a machine."""
    network_bytes_per_second: float | None = None
    """What a device sends to other machines, one way, all devices of its machine sending at once."""
    network_latency_seconds: float | None = None
    """Of one message between machines."""
    matmul_efficiency: float | None = None
    """The share of the peak that a large matrix product reaches."""
    matmul_flops_per_second: float | None = None
    """What a large matrix product reaches in train.precision; null means matmul_efficiency of the peak."""
    matmul_half_size: float | None = None
    """A matrix product whose smallest dimension is this reaches half of that; null means that all products reach it."""
    kernel_seconds: float | None = None
    """What each operation takes besides its arithmetic; null means nothing."""
    dollars_per_device_hour: float | None = None
    """What a device costs; null means no cost is named."""


def check_hardware(hardware: HardwareConfig) -> None:
    """Whether the group makes sense by itself. Raises ConfigError."""
    if hardware.device not in ("auto", "cpu", "cuda"):
        raise refuse("hardware.device", hardware.device, "is unknown", "use one of auto, cpu, cuda")
    for name, value in vars(hardware).items():
        if isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
            raise refuse(f"hardware.{name}", value, "is not above 0", "use a positive number, or null")
    if hardware.matmul_efficiency is not None and hardware.matmul_efficiency > 1:
        raise refuse("hardware.matmul_efficiency", hardware.matmul_efficiency, "is above 1", "use a share of the peak, such as 0.8")
