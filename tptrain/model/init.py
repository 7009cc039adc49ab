"""Initial weights, the same bits under every layout.

A value belongs to the logical tensor, not to the rank that holds it: it is drawn from a counter-based generator
(Philox) keyed by (seed, parameter name, block of rows). A rank draws the blocks that its slice touches, whatever
the slice. GPT-2's scheme: normal with `init_std`; the projections that write to the residual stream are divided by
sqrt(2 * num_layers); norms start at 1, biases at 0.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tptrain.config import ModelConfig
from tptrain.tensor_parallel.communication import shard_bounds

_BLOCK_ELEMENTS = 1 << 16
_RESIDUAL_PROJECTIONS = ("attention.out.weight", "mlp.down.weight")


@torch.no_grad()
def initialise(stage: nn.Module, model: ModelConfig, seed: int) -> None:
    """Fill every parameter of a stage. Parameters are DTensors over the tp mesh, named as in the whole model."""
    for name, parameter in stage.named_parameters():
        assert isinstance(parameter, DTensor), name
        std = _std(name, model)
        if name.endswith("bias"):
            parameter.to_local().zero_()
        elif std is None:
            parameter.to_local().fill_(1.0)
        else:
            _fill(parameter, name, std, seed)


def _std(name: str, model: ModelConfig) -> float | None:
    """Standard deviation of a weight, or None for a norm's."""
    if name.endswith("norm.weight"):
        return None
    return model.init_std / math.sqrt(2 * model.num_layers) if name.endswith(_RESIDUAL_PROJECTIONS) else model.init_std


def _fill(parameter: DTensor, name: str, std: float, seed: int) -> None:
    """Write this rank's slice of the logical values into a labelled matrix."""
    rows, columns = (_bounds(parameter, dim) for dim in (0, 1))
    values = parameter.to_local()
    size = rows_per_block(parameter.shape[1])
    for block in range(rows[0] // size, -(-rows[1] // size)):
        start, stop = max(rows[0], block * size), min(rows[1], (block + 1) * size)
        drawn = draw_block(seed, name, block, parameter.shape[0], parameter.shape[1])
        part = drawn[start - block * size : stop - block * size, columns[0] : columns[1]] * np.float32(std)
        values[start - rows[0] : stop - rows[0]].copy_(torch.from_numpy(np.ascontiguousarray(part)))


def rows_per_block(columns: int) -> int:
    """Rows that are drawn together; depends on the logical shape alone."""
    return max(1, _BLOCK_ELEMENTS // columns)


def draw_block(seed: int, name: str, block: int, rows: int, columns: int) -> np.ndarray:
    """Block `block` of a [rows, columns] parameter: standard normal, float32, [rows of the block, columns]."""
    size = rows_per_block(columns)
    key = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.standard_normal((min(size, rows - block * size), columns), dtype=np.float32)


def _bounds(parameter: DTensor, dim: int) -> tuple[int, int]:
    """What part of logical dimension `dim` this rank holds."""
    (placement,) = parameter.placements
    if isinstance(placement, Shard) and placement.dim == dim:
        return shard_bounds(parameter.shape[dim], parameter.device_mesh.size(), parameter.device_mesh.get_local_rank())
    return 0, parameter.shape[dim]
