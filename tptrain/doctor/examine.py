"""What the ranks of `tptrain doctor` do, with the process group up: look around, measure, and bring it all to rank 0.

Where something is slow, everything is measured once more, and of each number the better one counts.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tptrain.config import Config
from tptrain.doctor import judge
from tptrain.doctor.clock import clock_offset
from tptrain.doctor.links import measure_links, slowest_view
from tptrain.doctor.machine import look_around
from tptrain.doctor.matmul import matmul_rate
from tptrain.doctor.record import RankRecord, Report
from tptrain.doctor.together import Together
from tptrain.doctor.versions import own_versions
from tptrain.mesh import Mesh, build_mesh, own_device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SEEN_SECONDS = 5.0
"""How long a file may take to be seen on another host."""


def examine(config: Config, run_dir: Path, store_dir: Path) -> dict[str, Any] | None:
    """The `Report` as a dict on rank 0, None on the others. Every rank calls this. run_dir: a folder of this job's own."""
    mesh = build_mesh(config.parallel, own_device(config.hardware.device), config.launch.timeout_seconds)
    together = Together(mesh.world)
    own = look_around(dist.get_rank(), mesh.device, run_dir, store_dir)
    own.sees_run_folder = _sees(run_dir, mesh.world)
    own.clock_offset_seconds, own.clock_error_seconds = clock_offset(mesh.world)
    hosts: list[Any] = [None] * mesh.world.size()
    dist.all_gather_object(hosts, own.host, group=mesh.world)
    _tell(own, f"{mesh.world.size()} rank{'s' * (mesh.world.size() > 1)} on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)}: measuring")
    report = _measure(config, mesh, own, hosts, together)
    if together.largest(float(report is not None and bool(judge.slow(report, config.doctor)))):
        _tell(own, "something is slow: measuring once more")
        again = _measure(config, mesh, own, hosts, together)
        report = judge.better(report, again) if report is not None and again is not None else None
    return report.to_dict() if report is not None else None


def _tell(own: RankRecord, text: str) -> None:
    """On the terminal, once."""
    if own.rank == 0:
        print(text, flush=True)


def _measure(config: Config, mesh: Mesh, own: RankRecord, hosts: list[str], together: Together) -> Report | None:
    """One round of measurements; on rank 0 what all ranks found."""
    found = {name: matmul_rate(dtype, mesh.device, together) for name, dtype in _DTYPES.items()}
    own.matmul_flops_per_second = {name: rate for name, (rate, _) in found.items()}
    shares = [share for _, share in found.values() if share is not None]
    own.core_share = min(shares) if shares else None
    told = (own, measure_links(mesh, config.parallel, hosts, together))
    gathered: list[Any] | None = [None] * mesh.world.size() if own.rank == 0 else None
    dist.gather_object(told, gathered, dst=0, group=mesh.world)
    if gathered is None:
        return None
    return Report(own_versions(), [rank for rank, _ in gathered], slowest_view([link for _, links in gathered for link in links]))


def _sees(run_dir: Path, world: dist.ProcessGroup) -> bool:
    """Whether this rank sees what rank 0 writes into the run folder."""
    box: list[Any] = [f"seen-{uuid.uuid4().hex}"]
    if dist.get_rank() == 0:
        (run_dir / box[0]).touch()
    dist.broadcast_object_list(box, src=0, group=world, device=torch.device("cpu"))
    end, file = time.monotonic() + _SEEN_SECONDS, run_dir / box[0]
    while not (seen := file.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    return seen
