"""Saves a training state at once, and goes on from one, as a test needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def saver_of(trainer: Any, run_dir: Path) -> Any:
    """A saver by the trainer's config. Every rank calls this."""
    from tptrain.checkpoint.saver import Saver
    from tptrain.mesh import background_group

    return Saver(run_dir, trainer.config.checkpoint, background_group(60))


def save_now(trainer: Any, run_dir: Path) -> None:
    """Save, and return once it is on disk. Every rank calls this."""
    from tptrain.train import save_checkpoint

    saver = saver_of(trainer, run_dir)
    save_checkpoint(trainer, saver)
    saver.finish()


def start_from(trainer: Any, run_dir: Path) -> None:
    """Go on from where the trainer's config says. Every rank calls this."""
    from tptrain.mesh import background_group
    from tptrain.train import resume

    resume(trainer, run_dir, background_group(60))
