"""The numbers of `metrics.jsonl` for TensorBoard, in `RUN/tensorboard`: `tensorboard --logdir outputs` shows all runs.

A run that goes on writes the folder anew from `metrics.jsonl`, so that it lacks no step of a killed run and has none twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tptrain.monitor.log import prepare_logger
from tptrain.monitor.metrics import Record, plain

_FLUSH_SECONDS = 10


class TensorBoard:
    """Writes the records of one run, or, disabled, nothing. Needs the package tensorboard."""

    def __init__(self, enabled: bool, run_dir: Path, earlier: Sequence[Record] = ()) -> None:
        """earlier: the records of metrics.jsonl that the run goes on from."""
        self._writer: Any = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
            # purge_step: a TensorBoard that has already read the removed files forgets them.
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=0, flush_secs=_FLUSH_SECONDS)
            for record in earlier:
                self.log(record)
        except Exception as error:
            self._give_up(error)

    def log(self, record: Record) -> None:
        """Add a record: each number under its key, at its step and time. Unknown numbers are left out."""
        if self._writer is None:
            return
        try:
            for key, value in record.items():
                if key not in ("step", "time") and isinstance(number := plain(value), int | float):
                    self._writer.add_scalar(key, number, record["step"], walltime=record.get("time"))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Write out what is left; a second call does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        text = " ".join(str(error).split()) or type(error).__name__
        prepare_logger().warning("TensorBoard gets no more numbers: %s; metrics.jsonl has all of them", text)
