"""The most memory that this process has held."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def peak_memory_bytes(device_type: str) -> int:
    """The peak so far: what torch allocated on the GPU for cuda, the resident set for cpu."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return _peak_resident_bytes()


def reset_peak_memory() -> None:
    """Forget the peak so far, which in a sweep may be another job's. Where the system cannot, it stays."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes the present resident set


def _peak_resident_bytes() -> int:
    """VmHWM where /proc has it: getrusage's peak is inherited over fork and exec, so a small rank shows its launcher's."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
