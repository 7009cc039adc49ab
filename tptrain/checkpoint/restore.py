"""The checkpoint that all ranks start from: found by one, read by all, and passed over by all where one of them finds it damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tptrain.checkpoint.manifest import DamagedCheckpoint
from tptrain.checkpoint.reader import UnfitCheckpoint
from tptrain.checkpoint.start import find_start, pass_over
from tptrain.config import Config, ConfigError, refuse


def restore(config: Config, run_dir: Path, load: Callable[[Path], None], group: dist.ProcessGroup) -> tuple[Path | None, list[str]]:
    """Load the checkpoint that the run starts from; with checkpoint.resume=auto the newest that is sound. All ranks call this.

    load: reads a checkpoint into this rank's tensors, and raises DamagedCheckpoint on all ranks alike. Returns the checkpoint, or None,
    and on rank 0 a line for each that was passed over. Raises ConfigError on all ranks, as `find_start` does.
    """
    damage: dict[Path, str] = {}
    while True:
        start = _found_by_rank_0(config, run_dir, damage, group)
        try:
            if start is not None:
                load(start)
        except DamagedCheckpoint as error:
            assert start is not None
            damage[start] = str(error)
        except UnfitCheckpoint as error:
            rule = f"finds another model's checkpoint: {error}"
            raise refuse("checkpoint.resume", config.checkpoint.resume, rule, "use one of this model and optimizer") from None
        else:
            return start, pass_over(damage, start) if dist.get_rank() == 0 else []


def _found_by_rank_0(config: Config, run_dir: Path, damage: dict[Path, str], group: dist.ProcessGroup) -> Path | None:
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = find_start(config, run_dir, damage)
        except ConfigError as error:
            box[0] = error
    if group.size() > 1:
        dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    if isinstance(box[0], ConfigError):
        raise box[0]
    found: Path | None = box[0]
    return found
