"""What the tests of split layers share: meshes, random tensors, and a rank's part of a whole tensor by `torch.chunk`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import small_config
from tptrain.mesh import Mesh, build_mesh


def mesh_of(timeout_seconds: float = 60, **layout: int) -> Mesh:
    """The mesh of a layout such as tp=2, dp=2 (the axes not named are 1)."""
    return build_mesh(replace(small_config().parallel, **layout), torch.device("cpu"), timeout_seconds)


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal values, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(whole: Tensor, dim: int | None, parts: int, index: int) -> Tensor:
    """Part `index` of a tensor split along `dim` as `torch.chunk` splits (None: all of it). Parts may be empty."""
    if dim is None:
        return whole
    chunks = whole.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else whole.narrow(dim, 0, 0)


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Write this rank's part of `whole` into a parameter that is split over a one-dimensional mesh."""
    assert isinstance(parameter, DTensor)
    assert parameter.shape == whole.shape
    (placement,) = parameter.placements
    dim = placement.dim if isinstance(placement, Shard) else None
    parameter.to_local().copy_(part(whole, dim, parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()))


def whole_gradient(parameter: Tensor) -> Tensor:
    """A labelled parameter's gradient as a plain tensor; its label must be the parameter's own."""
    gradient = parameter.grad
    assert isinstance(gradient, DTensor)
    assert isinstance(parameter, DTensor)
    assert gradient.placements == parameter.placements
    assert gradient.shape == parameter.shape
    return gradient.full_tensor()


class collectives(TorchDispatchMode):
    """`with collectives() as counts`: every collective of the block by name, those of `torch.distributed` and DTensor's own."""

    def __enter__(self) -> dict[str, int]:
        self.counts: dict[str, int] = {}
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor breaks it up first, and what it does to plain tensors arrives here
        if function.namespace in ("c10d", "_c10d_functional") and not any(word in function.__name__ for word in ("wait", "_wrap_tensor")):
            name = function.__name__.split(".")[0].rstrip("_")
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))
