"""The most memory that this process has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_memory_bytes(device_type: str) -> int:
    """The peak so far: what torch allocated on the GPU for cuda, the resident set for cpu."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return _peak_resident_bytes()


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
