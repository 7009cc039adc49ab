"""A hook on the process groups: every collective, send and receive that this process starts, whoever calls it.

torch dispatches each call of a process group as an operator of the library `c10d`. The mode here sees them all: those of the layers, of
backward, and of `fully_shard`, on any backend and any device.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tptrain.mesh import Mesh
from tptrain.plan.communication import Totals

_OPERATIONS = {
    "allreduce_": "all_reduce", "allreduce_coalesced_": "all_reduce", "_allgather_base_": "all_gather", "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter", "broadcast_": "broadcast", "send": "send", "recv_": "receive",
}  # fmt: skip
"""The plan's words for the operators of c10d; any other keeps its own name."""


class CallCounter(TorchDispatchMode):
    """In its block, counts calls and bytes by process group and operation; bytes are those of the larger of input and output."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """names: what to call each group, by its `group_name`; others keep that name."""
        super().__init__()
        self._names = names
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    @property
    def totals(self) -> Totals:
        """Calls and bytes by group and operation, so far."""
        return {key: (self._calls[key], self._bytes[key]) for key in sorted(self._calls)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count it if it is a process group's."""
        operation = _operation(func)
        if operation is not None:
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if _is_group(arg)).group_name
            key = (self._names.get(group, group), operation)
            self._calls[key] += 1
            self._bytes[key] += max(_bytes(arg) for arg in args if not _is_group(arg))
        return func(*args, **(kwargs or {}))


def group_names(mesh: Mesh) -> dict[str, str]:
    """The plan's names of a mesh's groups, by `group_name`."""
    groups = {"tp": mesh.tp_group, "dp": mesh.dp_group, "pp_up": mesh.pp_up, "pp_down": mesh.pp_down, "world": mesh.world}
    groups |= {"embedding": mesh.embedding} if mesh.embedding is not None else {}
    return {group.group_name: name for name, group in groups.items()}


@functools.cache
def _operation(func: Any) -> str | None:
    """What the plan calls an operator; None for one that is no process group's."""
    library, _, name = func.name().partition("::")
    return _OPERATIONS.get(name, name) if library == "c10d" else None


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in argument._type().qualified_name()


def _bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))
