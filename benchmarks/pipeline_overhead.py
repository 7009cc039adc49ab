"""What tptrain's pipeline engine costs beside the stages' own work, on two CPU processes of one thread each.

python -m benchmarks.pipeline_overhead [--rounds 5] [--schedule 1f1b] [--layers 8] ...    time
python -m benchmarks.pipeline_overhead --memory [--layers 8] ...                         live activations

Time: the share of `engine.train` that is neither computation of a stage (forward, backward, weight gradients) nor a wait for the
other rank, medians over the steps. On gloo, starting a send copies as much of the tensor as the socket takes, and that counts as the
engine's own. Memory: the most bytes that autograd keeps at once for backward on the first rank, parameters left out, in units of
what one micro-batch needs: 1F1B holds as many micro-batches as there are stages, GPipe all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.two_ranks import CPU, RANKS, TIMEOUT_SECONDS, Sizes, add_sizes, barrier, config_of, our_step, say, start
from tptrain.data.dataset import Data
from tptrain.mesh import build_mesh
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.timeline import busy
from tptrain.pipeline.transfer import Message
from tptrain.trainer import Trainer


@dataclass(frozen=True)
class Options(Sizes):
    """The command line."""

    rounds: int
    schedule: str
    memory: bool


def parse() -> Options:
    """The options of the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5, help="steps that are timed, after one that is not")
    arguments.add_argument("--schedule", choices=list(SCHEDULES), default="1f1b")
    arguments.add_argument("--memory", action="store_true")
    add_sizes(arguments)
    return Options(**vars(arguments.parse_args()))


def trainer_of(options: Options, schedule: str) -> Trainer:
    """A pipeline of two stages that are as even as can be."""
    config = config_of(options, f"parallel.pp={RANKS}", f"parallel.schedule={schedule}", "parallel.partition=even")
    tokens = np.random.default_rng(0).integers(0, options.vocab, 100_000 + options.tokens)
    return Trainer(config, build_mesh(config.parallel, CPU, TIMEOUT_SECONDS), Data.of_tokens(config, tokens))


# ---- time ------------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds inside functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, on the clock."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return call


@contextlib.contextmanager
def watched(engine: Any) -> Iterator[dict[str, Stopwatch]]:
    """Stopwatches of the engine as a whole, of the waits for the other rank and of starting transfers.

    The names of the engine's insides stand here alone.
    """
    watches = {name: Stopwatch() for name in ("engine", "waiting", "starting")}
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(Message, "wait", watches["waiting"].timed(Message.wait)))
        for name in ("isend", "irecv"):
            patches.enter_context(mock.patch.object(dist, name, watches["starting"].timed(getattr(dist, name))))
        patches.enter_context(mock.patch.object(engine, "train", watches["engine"].timed(engine.train)))
        yield watches


def measure_time(options: Options) -> None:
    """Print, for each rank, where the engine's time goes."""
    trainer = trainer_of(options, options.schedule)
    our_step(trainer)
    shares: list[tuple[float, ...]] = []
    for _ in range(options.rounds):
        barrier()
        with watched(trainer.engine) as watches:
            our_step(trainer)
        whole, computing, waiting = watches["engine"].seconds, busy(trainer.spans), watches["waiting"].seconds
        shares.append((whole, computing / whole, waiting / whole, 1 - (computing + waiting) / whole, watches["starting"].seconds / whole))
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, [statistics.median(column) for column in zip(*shares, strict=True)])
    for rank, (whole, computing, waiting, rest, starting) in enumerate(everyone):
        say(
            f"{options.schedule}, rank {rank}: {whole * 1e3:.1f} ms a step in the engine: {computing:.2%} computing, "
            f"{waiting:.2%} waiting for the other rank, {rest:.2%} ({rest * whole * 1e3:.2f} ms) the engine's own, "
            f"of which {starting:.2%} starting sends and receives"
        )


# ---- memory ----------------------------------------------------------------------------------------------


class Kept:
    """A tensor that autograd keeps for backward."""

    def __init__(self, tensor: Tensor, ledger: Ledger) -> None:
        self.tensor, self.ledger = tensor.detach(), ledger
        ledger.add(tensor, 1)

    def __del__(self) -> None:
        self.ledger.add(self.tensor, -1)


class Ledger:
    """Bytes that autograd keeps at a time; a storage that several operations keep counts once."""

    def __init__(self, apart: list[Tensor]) -> None:
        """apart: tensors that do not count, as they live longer than a step."""
        self.apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self.holders: Counter[int] = Counter()
        self.bytes = self.peak_bytes = 0

    def add(self, tensor: Tensor, count: int) -> None:
        """One more (1) or one less (-1) operation keeps `tensor`."""
        storage = tensor.untyped_storage()
        address, before = storage.data_ptr(), self.holders[storage.data_ptr()]
        if address in self.apart or not tensor.is_floating_point():
            return
        self.holders[address] += count
        self.bytes += storage.nbytes() * ((before + count > 0) - (before > 0))
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def peak_bytes(options: Options, schedule: str) -> int:
    """The most bytes that autograd keeps at once on this rank in one step."""
    trainer = trainer_of(options, schedule)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    ledger = Ledger([p.to_local() if hasattr(p, "to_local") else p for p in parameters])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(tensor, ledger), lambda kept: kept.tensor):
        our_step(trainer)
    assert ledger.bytes == 0, f"{ledger.bytes} bytes are kept after the step"
    return ledger.peak_bytes


def measure_memory(options: Options) -> None:
    """Print the first rank's live activations as micro-batches."""
    unit = peak_bytes(dataclasses.replace(options, micro_batches=1), "gpipe")
    say(f"one micro-batch: {unit / 2**20:.2f} MiB kept for backward on rank 0")
    for schedule in ("1f1b", "gpipe"):
        for micro_batches in (8, 16):
            peak = peak_bytes(dataclasses.replace(options, micro_batches=micro_batches), schedule)
            say(f"{schedule}, {micro_batches} micro-batches: at most {peak / 2**20:.2f} MiB, {peak / unit:.2f} micro-batches at once")


def measure(options: Options) -> None:
    """One rank's part."""
    (measure_memory if options.memory else measure_time)(options)


if __name__ == "__main__":
    start(measure, parse())
