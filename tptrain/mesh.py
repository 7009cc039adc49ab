"""The ranks as a grid, and the process groups along its axes.

tp is innermost: its ranks talk most and sit closest together. With pp=2, dp=2, tp=2:

            tp0 tp1    tp0 tp1
    pp0   [  0   1 ] [  2   3 ]      rank = (pp * dp_size + dp) * tp_size + tp
    pp1   [  4   5 ] [  6   7 ]
             dp0        dp1

Nothing here is global: whoever needs a group is handed the `Mesh`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid and its groups. `tp` and `dp` are one-dimensional device meshes."""

    device: torch.device
    world: dist.ProcessGroup
    tp: DeviceMesh
    dp: DeviceMesh
    dp_tp: DeviceMesh
    pp_up: dist.ProcessGroup
    """This rank's pipeline; what one of its ranks sends to a higher one travels here."""
    pp_down: dist.ProcessGroup
    """The same ranks; what is sent to a lower one travels here. Two groups, so that on NCCL neither way queues behind the other."""
    embedding: dist.ProcessGroup | None
    """The first and the last rank of this rank's pipeline, which may share a tied embedding; None on other ranks and with pp=1."""
    pp_ranks: tuple[int, ...]
    """Global ranks of this rank's pipeline."""
    ranks: list[list[list[int]]]
    """The whole grid: global ranks by [pp][dp][tp]."""

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's layers."""
        return self.tp.get_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same slice of the model and read other samples."""
        return self.dp.get_group()

    @property
    def tp_rank(self) -> int:
        """Place in the tp group."""
        return self.tp.get_local_rank()

    @property
    def dp_rank(self) -> int:
        """Place in the dp group."""
        return self.dp.get_local_rank()

    @property
    def pp_rank(self) -> int:
        """Place in the pipeline."""
        return self.pp_ranks.index(dist.get_rank())

    @property
    def tp_size(self) -> int:
        """Ranks that share each layer."""
        return self.tp.size()

    @property
    def dp_size(self) -> int:
        """Copies of the model."""
        return self.dp.size()

    @property
    def pp_size(self) -> int:
        """Ranks that share the stack of layers."""
        return len(self.pp_ranks)


def own_device(kind: str) -> torch.device:
    """This rank's device by a settled `hardware.device`: cpu, or the GPU that it was given."""
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


def build_mesh(parallel: ParallelConfig, device: torch.device, timeout_seconds: float) -> Mesh:
    """Make the groups of a resolved layout. Every rank of the job calls this, in the same order.

    The groups are made here rather than by `init_device_mesh`, which leaves each with the backend's default
    time limit of up to half an hour.
    """
    grid = torch.arange(parallel.pp * int(parallel.dp) * parallel.tp).view(parallel.pp, int(parallel.dp), parallel.tp)
    pp, dp, tp = (int(axis) for axis in torch.nonzero(grid == dist.get_rank())[0])
    timeout = timedelta(seconds=timeout_seconds)

    def group(lines: torch.Tensor, name: str) -> dist.ProcessGroup:
        mine, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timeout, group_desc=name)
        return mine  # None on ranks that are in none of the lines

    tp_group = group(grid.reshape(-1, parallel.tp), "tp")
    dp_group = group(grid.transpose(1, 2).reshape(-1, int(parallel.dp)), "dp")
    pipelines = grid.permute(1, 2, 0).reshape(-1, parallel.pp)
    dp_tp = DeviceMesh.from_group([dp_group, tp_group], device.type, mesh=grid[pp], mesh_dim_names=("dp", "tp"))
    world = dist.group.WORLD
    assert world is not None, "the process group must exist before the mesh"
    mesh = Mesh(
        device=device,
        world=world,
        tp=dp_tp["tp"],
        dp=dp_tp["dp"],
        dp_tp=dp_tp,
        pp_up=group(pipelines, "pp up"),
        pp_down=group(pipelines, "pp down"),
        embedding=group(pipelines[:, [0, -1]], "embedding") if parallel.pp > 1 else None,
        pp_ranks=tuple(grid[:, dp, tp].tolist()),
        ranks=grid.tolist(),
    )
    _connect(mesh)
    return mesh


def background_group(timeout_seconds: float) -> dist.ProcessGroup:
    """All ranks again, over gloo, for a thread that talks while the others' groups are busy. Every rank calls this, in the same order."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds), group_desc="background")


def _connect(mesh: Mesh) -> None:
    """Let neighbours on the ring of a pipeline's ranks speak once in each direction.

    NCCL connects a pair at its first message, and that blocks both: in the middle of a schedule it could end in a deadlock.
    """
    last = mesh.pp_size - 1
    ups = [(rank, rank + 1) for rank in range(last)] + [(0, last)] * (last > 1)
    for group, messages in ((mesh.pp_up, ups), (mesh.pp_down, [(target, source) for source, target in ups])):
        for source, target in messages:
            token = torch.zeros(1, device=mesh.device)
            if mesh.pp_rank == source:
                dist.send(token, mesh.pp_ranks[target], group=group)
            if mesh.pp_rank == target:
                dist.recv(token, mesh.pp_ranks[source], group=group)
