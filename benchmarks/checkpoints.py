"""Saving and loading tensors on one and on two CPU processes, against a plain write and read of the same bytes in as many files.

python -m benchmarks.checkpoints [--rounds 5] [--layers 12] [--folder FOLDER] ...

The state is that of a GPT with AdamW: its weights and two moments of each, 12 bytes a parameter; two ranks split it as tp=2. Ways are
timed in turns; a turn lasts until the slower rank is done. Saving and the plain write end when the bytes are on disk. Loading and the plain
read fill the tensors' own memory, and find nothing in the page cache, from which the files are dropped before. Planning by
torch.distributed.checkpoint, checksums and the index count. `cached` is the plain read of files that are in the page cache, which loading
makes no use of.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.alternate import ratio, turns
from benchmarks.two_ranks import CPU, Sizes, barrier, config_of, measure_on_disk, say
from tptrain.checkpoint.sharded import materialise_state, read_tensors, training_tensors, write_tensors
from tptrain.data.dataset import Data
from tptrain.data.memorize import random_tokens
from tptrain.mesh import build_mesh
from tptrain.tensor_parallel.parameter import local_part
from tptrain.trainer import Trainer


def measure(options: argparse.Namespace) -> None:
    """One rank."""
    gc.freeze()  # as a training does
    names = ("layers", "hidden", "heads", "vocab", "seq_len", "micro_batch_size", "micro_batches")
    config = config_of(Sizes(*(getattr(options, name) for name in names)), f"parallel.tp={dist.get_world_size()}")
    mesh = build_mesh(config.parallel, CPU, 600)
    trainer = Trainer(config, mesh, Data.of_tokens(config, random_tokens(100 * config.data.seq_len + 1, config.model.vocab_size)))
    materialise_state(trainer.optimizer)
    tensors = training_tensors(trainer.share.parameters(), trainer.optimizer)
    for tensor in tensors.values():
        local_part(tensor).normal_()  # no disk may take zeros for nothing
    folder = Path(options.folder)
    timed = ways(folder, tensors, mesh.world)
    seconds = turns(timed, options.rounds, before=lambda: settle(folder))
    seconds |= turns({"cached": timed["read"]}, options.rounds, before=barrier)
    total = sum(path.stat().st_size for path in folder.rglob("*.tensors"))
    say(f"{dist.get_world_size()} ranks, {total / 1e6:,.0f} MB in as many files, {options.rounds} rounds")
    for name, values in seconds.items():
        median = statistics.median(values)
        say(f"  {name:<9} {median:7.3f} s ({min(values):.3f} to {max(values):.3f})  {total / median / 1e6:7,.0f} MB/s")
    say(f"  saving is {ratio(seconds['write'], seconds['save']):.2f} times as fast as a plain write")
    say(f"  loading is {ratio(seconds['read'], seconds['load']):.2f} times as fast as a plain read")


def ways(folder: Path, tensors: dict[str, Tensor], world: dist.ProcessGroup) -> dict[str, Callable[[], None]]:
    """What is timed."""
    pieces = [local_part(tensor).view(-1).view(torch.uint8).numpy().data for tensor in tensors.values()]
    plain, saved = folder / f"plain-{dist.get_rank()}", folder / "saved"
    saved.mkdir(exist_ok=True)

    def write() -> None:
        with open(plain, "wb", buffering=0) as file:
            for piece in pieces:
                file.write(piece)
            os.fsync(file.fileno())
        barrier()

    def read() -> None:
        with open(plain, "rb", buffering=0) as file:
            for piece in pieces:
                file.readinto(piece)
        barrier()

    return {
        "write": write,
        "save": lambda: write_tensors(saved, tensors, world),
        "read": read,
        "load": lambda: read_tensors(saved, tensors, world),
    }


def settle(folder: Path) -> None:
    """Drop the files, which are on disk, from the page cache."""
    barrier()
    if dist.get_rank() == 0:
        for path in [*folder.glob("plain-*"), *folder.rglob("*.tensors")]:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    barrier()


if __name__ == "__main__":
    measure_on_disk(measure, __doc__, "checkpoints-")
