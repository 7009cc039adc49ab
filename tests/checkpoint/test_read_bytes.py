"""A rank reads its own bytes and hardly any others, whichever layout wrote the checkpoint: counted by the operating system."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config

MODEL = {
    "model__hidden_size": 768, "model__num_heads": 12, "model__num_layers": 2, "model__ffn_hidden_size": 3072, "model__vocab_size": 2047,
    "model__tie_embeddings": False,
}  # fmt: skip
LIMIT = 1.05


def trainer_of(**layout: Any) -> Any:
    """A trainer, whose optimizer has its state."""
    from tptrain.checkpoint.sharded import materialise_state
    from tptrain.data.dataset import Data
    from tptrain.mesh import build_mesh
    from tptrain.trainer import Trainer

    config = small_config(**MODEL, **{f"parallel__{key}": size for key, size in layout.items()})
    trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 120), Data.of_tokens(config, skewed_tokens(2000, 2047)))
    materialise_state(trainer.optimizer)
    return trainer


def tensors_of(trainer: Any) -> dict[str, Any]:
    """The trainer's tensors."""
    from tptrain.checkpoint.sharded import training_tensors

    return training_tensors(trainer.share.parameters(), trainer.optimizer)


def bytes_read() -> int:
    """What this process has read so far, from files of all kinds, by read and its like."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def count(rank: int, folder: Path) -> dict[str, tuple[int, int, int]]:
    """By layout that saved: the bytes that this rank of tp4_pp2 reads from the tensors' files and those that it holds; and of the JSON."""
    import torch.distributed as dist

    from tptrain.checkpoint.sharded import read_tensors, write_tensors
    from tptrain.tensor_parallel.parameter import local_part

    world = dist.group.WORLD
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())]
    wide = tensors_of(trainer_of(tp=2, dp=4))
    if rank == 0:
        for name in ("tp2_dp4", "single"):
            (folder / name).mkdir()
    dist.barrier(group=world)
    write_tensors(folder / "tp2_dp4", wide, world)
    shapes = {name: tuple(tensor.shape) for name, tensor in wide.items()}  # of whole tensors; there is one stage
    if rank == 0:
        write_tensors(folder / "single", {name: torch.rand(shape) for name, shape in shapes.items()}, alone[0])
    del wide
    mine = tensors_of(trainer_of(tp=4, pp=2))
    own = sum(local_part(tensor).nbytes for tensor in mine.values())
    dist.barrier(group=world)
    found = {}
    for name in ("single", "tp2_dp4"):
        nothing = bytes_read()
        before = bytes_read()
        read_tensors(folder / name, mine, None)
        read = bytes_read() - before - (before - nothing)
        index = (folder / name / "tensors.json").stat().st_size
        found[name] = (read - index, own, index)
    dist.barrier(group=world)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc counts the bytes")
def test_a_rank_of_tp4_pp2_reads_its_own_bytes(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(8, count, tmp_path, timeout=500)):
        for saved, (read, own, index) in found.items():
            print(f"rank {rank}, saved by {saved}: read {read:,} bytes and {index:,} of JSON, holds {own:,}: {read / own:.4f}")
            assert own <= read <= LIMIT * own, (rank, saved)
            assert own > 10_000_000
            assert index < 0.01 * own
