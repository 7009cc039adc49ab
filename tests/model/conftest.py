"""A process group of one, for tests that need no second rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.tensor_parallel.support import mesh_of
from tptrain.mesh import Mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """The mesh of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield mesh_of()
    dist.destroy_process_group()
