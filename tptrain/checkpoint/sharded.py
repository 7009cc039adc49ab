"""Saving and loading a training state with `torch.distributed.checkpoint`: what is written by whom, and read by whom, in any layout.

The bytes are written and read by `writer.py` and `reader.py`.

Every tensor has one key, its parameter's name in the whole model: `model.layers.17.mlp.up.weight` and
`optimizer.layers.17.mlp.up.weight.exp_avg`. The tensors are DTensors, so the files describe logical tensors and any
layout loads what any other saved. Everything else is a few numbers in `state.json`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from tptrain.checkpoint.folder import read_state
from tptrain.checkpoint.manifest import DamagedCheckpoint
from tptrain.checkpoint.reader import FittingPlanner, TileReader, UnfitCheckpoint
from tptrain.checkpoint.writer import TileWriter
from tptrain.config import refuse


def load(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, group: dist.ProcessGroup) -> None:
    """Fill parameters and their optimizer state from a checkpoint of any layout. All ranks of `group` call this.

    Raises what `read_tensors` raises.
    """
    materialise_state(optimizer)
    read_tensors(folder, training_tensors(parameters, optimizer), group)


def load_model(folder: Path, stage: nn.Module, world: dist.ProcessGroup) -> dict[str, Any]:
    """Fill a stage alone, in its parameters' dtype, from a complete checkpoint of any layout. All ranks call this. Returns the saved state.

    Raises ConfigError on all ranks where the checkpoint is damaged or of another model.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in stage.named_parameters()}
    with _refusing(folder):
        read_tensors(folder, tensors, world, complete=True)
        return read_state(folder)


def load_whole(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill whole plain tensors, by their names in the whole model, from a complete checkpoint of any layout. One process alone calls this.

    Raises ConfigError where the checkpoint is damaged or of another model.
    """
    with _refusing(folder):
        read_tensors(folder, {f"model.{name}": tensor for name, tensor in tensors.items()}, None, complete=True)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write tensors into a folder that exists: each part once, by one of the ranks that have it.

    All ranks of `group` call this, from any thread, with the tensors that they have: DTensors, or plain ones, which are equal on all ranks
    that have them. When it returns, each rank's file and `tensors.json` are on disk. Raises OSError on all ranks where one has it.
    """
    with _plain_errors(f"writing {folder}"):
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(dict(tensors), storage_writer=TileWriter(folder), planner=planner, process_group=group)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None, complete: bool = False) -> None:
    """Fill tensors, DTensors or plain ones, of any dtype, from a checkpoint of any layout.

    All ranks of `group` call this, each with its own tensors; without a group it concerns this process alone. complete: compare the folder
    with its manifest first. Raises on all ranks what the first one that fails meets: DamagedCheckpoint, or UnfitCheckpoint where a tensor
    is not there or has another shape. Some tensors may have been filled by then.
    """
    reader, planner = TileReader(folder, complete), FittingPlanner(folder)
    with _plain_errors(f"reading {folder}"):
        if group is not None:
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=group)
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=True)


def training_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and their optimizer state by their keys in a checkpoint. The tensors are the live ones."""
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def materialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Let a new optimizer allocate its state, by a step with zero gradients and learning rate zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@contextlib.contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Turn CheckpointException, which is no Exception and lists every rank's trace, into the first rank's own error, in one line."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, (OSError, DamagedCheckpoint, UnfitCheckpoint)):
            raise cause from None
        raise RuntimeError(f"{what} failed on rank {rank}: {type(cause).__name__}: {cause}") from cause


@contextlib.contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Refuse a checkpoint that somebody chose and that cannot be used."""
    try:
        yield
    except (DamagedCheckpoint, UnfitCheckpoint) as error:
        raise refuse("checkpoint", folder.name, f"cannot be used: {error}", "use another") from None
