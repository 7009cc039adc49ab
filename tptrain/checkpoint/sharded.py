"""Loading a training state, and the tensors that one is.

A state is the parameters and their optimizer state, each tensor under one key, its name in the whole model (see `chunks.py`), and a few
numbers in `state.json`. All ranks check and load together: what one of them finds wrong, all refuse in the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tptrain.checkpoint.folder import find_start, read_state
from tptrain.checkpoint.manifest import DamageError, check_content, check_sizes
from tptrain.checkpoint.reader import StoredTensors, fill_own
from tptrain.config import Config, ConfigError, refuse


def choose_start(config: Config, run_dir: Path, world: dist.ProcessGroup) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint that the run starts from, checked byte by byte, each rank a part; and a line for each that was passed over.

    All ranks call this. Rank 0 looks, so that all take the same. Raises ConfigError on all, as `find_start` does.
    """
    damage: dict[Path, str] = {}
    while True:
        found: list[Path | ConfigError | None] = [None]
        if dist.get_rank() == 0:
            try:
                found[0] = find_start(config, run_dir, damage)
            except ConfigError as error:
                found[0] = error
        dist.broadcast_object_list(found, src=0, group=world, device=torch.device("cpu"))
        start = found[0]
        if isinstance(start, ConfigError):
            raise start
        if start is None:
            return None, damage
        what = _together(partial(_check_share, start, world), world)
        if what is None:
            return start, damage
        damage[start] = what


def load(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, world: dist.ProcessGroup
) -> dict[str, Any]:
    """Fill parameters and their optimizer state from a checkpoint of any layout. All ranks call this. Returns the saved state.

    The folder is one that `choose_start` gave. Raises ConfigError on all ranks where it does not fit.
    """
    materialise_state(optimizer)
    _fill(folder, training_tensors(parameters, optimizer), "checkpoint.resume", world)
    return read_state(folder)


def load_model(folder: Path, stage: nn.Module, world: dist.ProcessGroup) -> dict[str, Any]:
    """Check a checkpoint of any layout, and fill a stage alone from it, in its parameters' dtype.

    All ranks call this. Returns the saved state. Raises ConfigError on all ranks where the checkpoint is damaged or does not fit.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in stage.named_parameters()}
    what = _together(partial(_check_share, folder, world), world)
    if what is not None:
        raise refuse("checkpoint", folder, f"cannot be used: {what}", "use another")
    _fill(folder, tensors, "checkpoint", world)
    return read_state(folder)


def check_whole(folder: Path) -> None:
    """Check every byte of a checkpoint. One process alone calls this. Raises ConfigError where it is damaged."""
    try:
        files = check_sizes(folder)
        check_content(folder, files, files)
    except DamageError as error:
        raise refuse("checkpoint", folder, f"cannot be used: {error}", "use another") from None


def load_whole(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill whole plain tensors, by their names in the whole model, from a checkpoint of any layout. One process alone calls this.

    Raises ConfigError where they do not fit. Whether the bytes are what was written is for `check_whole`.
    """
    wanted: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in tensors.items()}
    try:
        stored = StoredTensors(folder)
        if what := stored.misfit(wanted):
            raise DamageError(what)
        fill_own(stored, wanted)
    except DamageError as error:
        raise refuse("checkpoint", folder, str(error), "use a checkpoint of this model") from None


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


def _fill(folder: Path, tensors: Mapping[str, Tensor], key: str, world: dist.ProcessGroup) -> None:
    """Fill what this rank has of each tensor. Raises ConfigError on all ranks where one of them cannot."""
    opened: list[StoredTensors] = []

    def look() -> None:
        opened.append(StoredTensors(folder))
        if what := opened[0].misfit(tensors):
            raise DamageError(what)

    what = _together(look, world)
    if what is not None:
        raise refuse(key, folder, what, "use a checkpoint of this model and optimizer")
    what = _together(partial(fill_own, opened[0], tensors), world)
    if what is not None:
        raise refuse(key, folder, f"cannot be used: {what}", "use another")


def _check_share(folder: Path, world: dist.ProcessGroup) -> None:
    """Check this rank's share of a checkpoint's files against the manifest. Raises DamageError."""
    files = check_sizes(folder)
    check_content(folder, files, sorted(name for name in files if not name.endswith(".json"))[dist.get_rank() :: world.size()])


def _together(action: Callable[[], None], world: dist.ProcessGroup) -> str | None:
    """Act on all ranks; the words of the first one's DamageError, on all of them, or None."""
    own: str | None = None
    try:
        action()
    except DamageError as error:
        own = str(error)
    found: list[str | None] = [None] * world.size()
    dist.all_gather_object(found, own, group=world)
    return next((what for what in found if what is not None), None)
