"""Saving and loading a training state with `torch.distributed.checkpoint`.

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


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Thin."""
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=True), process_group=group)
    except CheckpointException as error:
        for rank, (cause, _) in sorted(error.failures.items()):
            if isinstance(cause, OSError):
                raise OSError(f"rank {rank}: {cause}") from None
        raise


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Thin."""
    with _plain_errors(f"loading {folder} failed"):
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), process_group=group)


def load(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, world: dist.ProcessGroup
) -> dict[str, Any]:
    """Fill parameters and their optimizer state from a checkpoint of any layout. All ranks call this. Returns the saved state."""
    materialise_state(optimizer)
    read_tensors(folder, training_tensors(parameters, optimizer), world)
    return read_state(folder)


def load_model(folder: Path, stage: nn.Module, world: dist.ProcessGroup) -> dict[str, Any]:
    """Fill a stage alone, in its parameters' dtype, from a checkpoint of any layout. All ranks call this. Returns the saved state."""
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in stage.named_parameters()}
    with _plain_errors(f"loading {folder} failed"):
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), process_group=world)
    return read_state(folder)


def load_whole(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill whole plain tensors, by their names in the whole model, from a checkpoint of any layout. One process alone calls this."""
    wanted: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in tensors.items()}
    with _plain_errors(f"loading {folder} failed"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


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
    """Turn CheckpointException, which is no Exception and lists every rank's trace, into a RuntimeError with the first cause."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise RuntimeError(f"{what} on rank {rank}: {type(cause).__name__}: {cause}") from cause
