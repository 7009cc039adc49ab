"""What a training will want of memory and disk at the least: what follows from the model, the optimizer and the layout alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tptrain.config import Config
from tptrain.model.flops import num_parameters
from tptrain.plan.pipeline import describe

_WEIGHT_BYTES = _GRADIENT_BYTES = _MOMENT_BYTES = 4


@dataclass(frozen=True)
class Needs:
    """In bytes."""

    states: list[int]
    """Of each rank: weights, gradients and the optimizer's moments; activations come on top."""
    checkpoint: int
    """One checkpoint, of all ranks together."""
    checkpoints: int
    """How many there may be at once: those that are kept, and one that is being written."""
    existing: int
    """What is in the run folder's checkpoints already."""


def needs_of(config: Config, run_dir: Path) -> Needs:
    """Of a resolved config."""
    parallel, optimizer = config.parallel, config.optimizer
    moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
    kept = _WEIGHT_BYTES + moments * _MOMENT_BYTES
    held = [0] * parallel.pp
    for stage in describe(config).stages:
        held[stage.rank] += stage.parameters
    copies = parallel.tp * int(parallel.dp)  # ranks that share a pipeline rank's parameters
    states = [parameters * (kept + _GRADIENT_BYTES) // copies for parameters in held for _ in range(copies)]
    files = (run_dir / "checkpoints").rglob("*")
    existing = sum(file.stat().st_size for file in files if file.is_file())
    return Needs(states, num_parameters(config.model) * kept, config.checkpoint.keep + 1, existing)
