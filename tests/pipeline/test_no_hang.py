"""200 random pipelines, one after another on the same ranks: none waits for ever, and each computes what the serial one does."""

from __future__ import annotations

import random

import pytest
import torch.distributed as dist

from tests.pipeline.test_engine import STAGES_PER_RANK, check_training
from tests.ranks import run_ranks
from tests.tensor_parallel.support import mesh_of


@pytest.mark.parametrize(("world", "count"), [(2, 60), (3, 70), (4, 70)])
def test_random_configurations_back_to_back(world: int, count: int) -> None:
    run_ranks(world, run_configurations, count, timeout=300)


def run_configurations(rank: int, count: int) -> None:
    mesh = mesh_of(timeout_seconds=60, pp=dist.get_world_size())
    choice = random.Random(count * 10 + mesh.pp_size)
    for _ in range(count):
        schedule = choice.choice(list(STAGES_PER_RANK))
        check_training(mesh, schedule, choice.choice(STAGES_PER_RANK[schedule]), choice.randint(1, 16))
