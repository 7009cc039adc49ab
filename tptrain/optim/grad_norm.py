"""The norm of the whole model's gradient, and clipping by it.

Every element of the logical gradient counts once: a shard counts where it lives; what is replicated along a mesh axis
counts on that axis's first rank. The placements say which is which. A tied embedding's second copy is left out by
the caller.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from tptrain.tensor_parallel.parameter import local_part

_PIECE_ELEMENTS = 1 << 14
"""Elements whose squares are added in fp32; the pieces' sums are added in fp64."""


def squared_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """This rank's share of the squared gradient norm, fp64 scalar. Summed over all ranks it is the whole."""
    counted = [local_part(gradient) for gradient in gradients if _counts_here(gradient)]
    if device.type == "cpu":  # where torch adds in fp32 one after the other: 2.5e-4 off for 8 million elements
        counted = [piece for part in counted for piece in part.flatten().split(_PIECE_ELEMENTS)]
    counted = [part for part in counted if part.numel()]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(counted)).double().square().sum()


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """What gradients of norm `norm` are multiplied by so that their norm is at most `limit`: a scalar of at most 1."""
    return (limit / norm).clamp(max=1.0)


def scale_gradients(gradients: Iterable[Tensor], scale: Tensor) -> None:
    """Multiply all gradients in place, without waiting for the device to know the scale."""
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], scale.float())


def _counts_here(gradient: Tensor) -> bool:
    """Whether this rank is the first along every axis on which the gradient is replicated."""
    if not isinstance(gradient, DTensor):
        return True
    coordinate = gradient.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(place == 0 for place, placement in zip(coordinate, gradient.placements, strict=True) if isinstance(placement, Replicate))
