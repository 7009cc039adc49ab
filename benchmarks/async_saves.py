"""What a save costs a training loop on one and on two CPU processes: how long it is held, in the background and not, and the memory for it.

python -m benchmarks.async_saves [--rounds 5] [--layers 12] [--folder FOLDER] ...

The state is that of a GPT with AdamW, 12 bytes a parameter; two ranks split it as tp=2. In turns it is saved in the loop and in the
background, each followed by as many steps as the writing takes. `held` is what the call of the save takes. `in all` is by how much the
call and these steps take longer than as many steps without a save: on a CPU the writing thread takes time from the training threads. The
memory is what a rank's resident set grows by when the first background save is prepared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.two_ranks import CPU, Sizes, barrier, config_of, measure_on_disk, our_step, say
from tptrain.checkpoint.folder import checkpoint_folder
from tptrain.checkpoint.saver import Saver
from tptrain.data.dataset import Data
from tptrain.data.memorize import random_tokens
from tptrain.mesh import background_group, build_mesh
from tptrain.trainer import Trainer


def measure(options: argparse.Namespace) -> None:
    """One rank."""
    names = ("layers", "hidden", "heads", "vocab", "seq_len", "micro_batch_size", "micro_batches")
    config = config_of(Sizes(*(getattr(options, name) for name in names)), f"parallel.tp={dist.get_world_size()}")
    mesh = build_mesh(config.parallel, CPU, 600)
    trainer = Trainer(config, mesh, Data.of_tokens(config, random_tokens(100 * config.data.seq_len + 1, config.model.vocab_size)))
    group, runs = background_group(600), {}
    for name, in_background in (("in the loop", False), ("in the background", True)):
        checkpoint = replace(config.checkpoint, async_save=in_background, keep=1)
        runs[name] = Saver(Path(options.folder, name.replace(" ", "-")), checkpoint, group)
    for _ in range(2):
        our_step(trainer)
    before = resident_bytes()
    runs["in the background"].prepare(trainer.share.owned_parameters(), trainer.optimizer)
    runs["in the background"].wait()
    grown = resident_bytes() - before
    held: dict[str, list[float]] = {name: [] for name in runs}
    in_all: dict[str, list[float]] = {name: [] for name in runs}
    steps = 1
    for turn in range(1 + options.rounds):
        for name, saver in runs.items():
            plain = timed(lambda: [our_step(trainer) for _ in range(steps)])  # noqa: B023  # called at once
            barrier()
            began = time.perf_counter()
            call = timed(lambda: save(saver, trainer))  # noqa: B023
            after = timed(lambda: [our_step(trainer) for _ in range(steps)])  # noqa: B023
            saver.finish()
            if turn:
                held[name].append(call)
                in_all[name].append(call + after - plain)
            elif name == "in the background":
                steps = max(1, round(steps * (time.perf_counter() - began) / plain))
    total = sum(path.stat().st_size for path in checkpoint_folder(saver.home, trainer.steps_done - steps).glob("*.tensors"))
    report(options, total, grown, held, in_all, steps)


def save(saver: Saver, trainer: Trainer) -> None:
    """Save the state that the trainer has now."""
    saver.save(trainer.share.owned_parameters(), trainer.optimizer, {"step": trainer.steps_done, "config": {}})


def timed(work: Any) -> float:
    """Seconds until the slower rank is done."""
    began = time.perf_counter()
    work()
    barrier()
    return time.perf_counter() - began


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def report(
    options: argparse.Namespace, total: int, grown: int, held: dict[str, list[float]], in_all: dict[str, list[float]], steps: int
) -> None:
    """Say what was measured."""
    ranks = dist.get_world_size()
    say(f"{ranks} rank{'s' * (ranks > 1)}, {total / 1e6:,.0f} MB, {options.rounds} rounds, {steps} steps after each save")
    whole = statistics.median(held["in the loop"])
    for name, values in held.items():
        median, all_of_it = statistics.median(values), statistics.median(in_all[name])
        say(f"  {name:<18} held {median:7.3f} s ({min(values):.3f} to {max(values):.3f}), {median / whole:6.1%};"
            f"  in all {all_of_it:7.3f} s, {all_of_it / whole:6.1%}")  # fmt: skip
    say(f"  memory for it: {grown / 1e6:,.0f} MB on rank 0, {grown * ranks / total:.2f} times the bytes that it writes")


if __name__ == "__main__":
    measure_on_disk(measure, __doc__, "async-saves-")
