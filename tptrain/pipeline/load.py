"""The schedule that a config names."""

from __future__ import annotations

from tptrain.config import ParallelConfig
from tptrain.pipeline.actions import Schedule, with_transfers
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.validate import validate


def load_schedule(parallel: ParallelConfig) -> Schedule:
    """The schedule with transfers."""
    schedule = with_transfers(SCHEDULES[parallel.schedule](parallel.pp, int(parallel.stages_per_rank), parallel.micro_batches))
    validate(schedule, parallel.micro_batches)
    return schedule
