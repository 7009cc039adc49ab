"""Saving and loading a checkpoint on two CPU processes, against a plain write and read of as many bytes in as many files.

python -m benchmarks.checkpoints [--rounds 5] [--folder FOLDER] [--layers 8] [--hidden 512] ...

A GPT with AdamW under tp=2, so each rank writes half of 12 bytes a parameter. Ways are timed in turns; a turn lasts until the slower rank
is done. Reads find nothing in the page cache: the files are dropped from it before. The plain read goes into memory that is there
already. `load` checks every byte, allocates the optimizer's state and fills weights and state.

    held    how long the loop stands still for an asynchronous save
    loop    how much longer some steps take with one save at their beginning than with none
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import torch.distributed as dist

from benchmarks.alternate import ratio, turns
from benchmarks.two_ranks import CPU, RANKS, Sizes, add_sizes, barrier, config_of, our_step, say, start
from tptrain.checkpoint.saver import Saver
from tptrain.checkpoint.sharded import choose_start, load
from tptrain.data.dataset import Data
from tptrain.data.memorize import random_tokens
from tptrain.mesh import background_group, build_mesh
from tptrain.train import save_checkpoint
from tptrain.trainer import Trainer


def measure(options: argparse.Namespace) -> None:
    """One rank."""
    names = ("layers", "hidden", "heads", "vocab", "seq_len", "micro_batch_size", "micro_batches")
    config = config_of(Sizes(*(getattr(options, name) for name in names)), f"parallel.tp={RANKS}", "checkpoint.keep=1")
    mesh = build_mesh(config.parallel, CPU, 600)
    trainer = Trainer(config, mesh, Data.of_tokens(config, random_tokens(100 * config.data.seq_len + 1, config.model.vocab_size)))
    our_step(trainer)
    run_dir, group = Path(options.folder) / "run", background_group(600)
    saver = Saver(run_dir, config.checkpoint, group)
    plain = Path(options.folder) / f"plain-{dist.get_rank()}"

    def save(asynchronous: bool) -> None:
        config.checkpoint.async_save = asynchronous
        save_checkpoint(trainer, saver)

    def settle() -> None:
        saver.finish()
        for path in [plain, *run_dir.rglob("*.tensors")]:
            if path.exists():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        barrier()

    def steps(asynchronous: bool | None) -> None:
        if asynchronous is not None:
            save(asynchronous)
        for _ in range(options.steps):
            our_step(trainer)
        saver.finish()

    save(True)
    settle()
    folder = run_dir / "checkpoints" / f"step-{trainer.steps_done:08d}"
    buffer = memoryview(bytearray((folder / f"rank-{dist.get_rank():05d}.tensors").stat().st_size))

    def write() -> None:
        with open(plain, "wb", buffering=0) as file:
            for first in range(0, len(buffer), 8 << 20):
                file.write(buffer[first : first + (8 << 20)])
            os.fsync(file.fileno())

    def read() -> None:
        with open(plain, "rb", buffering=0) as file:
            for first in range(0, len(buffer), 8 << 20):
                file.readinto(buffer[first : first + (8 << 20)])

    def load_all() -> None:
        start, damage = choose_start(config, run_dir, mesh.world)
        assert start is not None, damage
        load(start, trainer.share.parameters(), trainer.optimizer, mesh.world)

    ways = {"write": write, "sync": lambda: save(False), "read": read, "load": load_all, "held": lambda: save(True)}

    def until_all(way: object) -> object:
        def run() -> None:
            way()  # type: ignore[operator]
            barrier()

        return run

    timed = {name: (way if name == "held" else until_all(way)) for name, way in ways.items()}
    seconds = turns(timed, options.rounds, before=settle)  # type: ignore[arg-type]
    loops = turns({"none": lambda: steps(None), "sync": lambda: steps(False), "async": lambda: steps(True)}, options.rounds, 0, settle)
    settle()
    total = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*.tensors"))
    say(f"{total / 1e6:,.0f} MB in {RANKS} files, {len(buffer) / 1e6:,.0f} MB of staging memory a rank; {options.rounds} rounds")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        say(f"  {name:<6} {median[name]:7.3f} s ({min(values):.3f} to {max(values):.3f})  {total / median[name] / 1e6:7,.0f} MB/s")
    saving, loading = ratio(seconds["write"], seconds["sync"]), ratio(seconds["read"], seconds["load"])
    say(f"saving is {saving:.2f} times as fast as a plain write, loading {loading:.2f} times as a plain read")
    say(f"an asynchronous save holds the loop for {median['held'] / median['sync']:.1%} of a synchronous one's time")
    extra = {name: statistics.median(a - b for a, b in zip(loops[name], loops["none"], strict=True)) for name in ("sync", "async")}
    none, sync, asynchronous = statistics.median(loops["none"]), extra["sync"], extra["async"]
    say(f"{options.steps} steps: {none:.2f} s; with a save {sync:+.2f} s if synchronous, {asynchronous:+.2f} s if not")


def main() -> None:
    """Read the command line and start two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.set_defaults(seq_len=128, micro_batch_size=1, micro_batches=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a loop with one save")
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder")
    options = parser.parse_args()
    options.folder = tempfile.mkdtemp(prefix="checkpoints-", dir=options.folder)
    try:
        start(measure, options)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
