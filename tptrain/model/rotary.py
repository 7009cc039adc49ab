"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the form that Llama's published weights are for.

Element i and element i + d/2 of a head are a pair, turned by the angle position / theta^(2i/d).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles, fp32, [s, d/2] or [b, 1, s, d/2]."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_size: int, theta: float) -> Rotation:
    """The angles of some positions. positions: [s] int64, or [b, 1, s] where each row has its own."""
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions.float().unsqueeze(-1) / theta**exponents
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn the pairs of each head. x: [b, heads, s, d] -> the same, in x's dtype, in memory as [b, s, heads, d]: what attention likes."""
    cos, sin = (table.movedim(-3, -2) if table.ndim == 4 else table.unsqueeze(-2) for table in turn)
    first, second = x.transpose(1, 2).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype).transpose(1, 2)
