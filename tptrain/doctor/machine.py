"""Where a rank runs: its device, and what is free of memory and disk."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import psutil
import torch

from tptrain.doctor.record import RankRecord

_CGROUPS = Path("/sys/fs/cgroup")


def look_around(rank: int, device: torch.device, run_dir: Path, store_dir: Path) -> RankRecord:
    """What this rank can say of its machine without the others."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} {device.index}"
        free, total = torch.cuda.mem_get_info(device)
    else:
        name = f"cpu, {threads} thread{'s' * (threads > 1)}"
        free, total = host_memory()
    return RankRecord(
        rank=rank,
        host=socket.gethostname(),
        device=name,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        memory_free_bytes=free,
        memory_total_bytes=total,
        run_disk_free_bytes=disk_free(run_dir),
        store_disk_free_bytes=disk_free(store_dir),
    )


def disk_free(folder: Path) -> int:
    """Bytes that may still be written where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def host_memory() -> tuple[int, int]:
    """Free and total bytes of the machine, or of the tightest control group around this process (Linux, version 2)."""
    memory = psutil.virtual_memory()
    found = [(memory.available, memory.total), *_control_groups()]
    return min(found)


def _control_groups() -> list[tuple[int, int]]:
    """Free and total bytes of each group around this process that has a limit. Its files in memory count as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.partition("::/")[2] for line in lines if line.startswith("0::/")), "")
    folders = [_CGROUPS.joinpath(*Path(own).parts[:depth]) for depth in range(1, len(Path(own).parts) + 1)]
    found = []
    for folder in folders:
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # "max": no limit
            continue
        found.append((limit - used + int(counts.get("inactive_file", 0)), limit))
    return found
