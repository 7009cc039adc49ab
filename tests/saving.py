"""Saves a checkpoint of a trainer at once, as a test needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_now(trainer: Any, run_dir: Path) -> None:
    """Save by the config, and wait for it. Every rank calls this."""
    from tptrain.checkpoint.saver import Saver
    from tptrain.mesh import background_group
    from tptrain.train import save_checkpoint

    saver = Saver(run_dir, trainer.config.checkpoint, background_group(60))
    save_checkpoint(trainer, saver)
    saver.finish()
