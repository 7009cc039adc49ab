"""Freed memory stays with the process: read from the kernel's count of this process's pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys
import torch
from tptrain.host_memory import keep_freed_memory

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
block = torch.ones(64 * 2**20)  # 256 MiB
del block
print(resident() - before)
"""


def grown_by(mode: str) -> int:
    """Bytes that a process has more after it made and freed a block."""
    probe = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
    return int(probe.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_a_freed_block_stays_resident_only_where_it_is_asked_for() -> None:
    kept, given_back = (grown_by(mode) for mode in ("keep", "no"))
    assert kept > 250 * 2**20
    assert given_back < 50 * 2**20
