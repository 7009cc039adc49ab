"""What the benchmarks on two CPU processes share: the model and the batch, starting the ranks, a mesh of one, a step, a line of output."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh

from tptrain.cli import compose
from tptrain.config import Config, resolve
from tptrain.mesh import Mesh
from tptrain.trainer import Trainer

RANKS = 2
TIMEOUT_SECONDS = 600
CPU = torch.device("cpu")


# ---- the model and the batch -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The model and a step, as the command line says."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    seq_len: int
    micro_batch_size: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.micro_batches * self.micro_batch_size * self.seq_len


def add_sizes(arguments: argparse.ArgumentParser) -> None:
    """Let the command line set `Sizes`."""
    sizes = {"layers": 8, "hidden": 512, "heads": 8, "vocab": 16384, "seq-len": 256, "micro-batch-size": 2, "micro-batches": 8}
    for name, value in sizes.items():
        arguments.add_argument(f"--{name}", type=int, default=value)


def config_of(sizes: Sizes, *overrides: str) -> Config:
    """A GPT with learned positions and a head of its own, as `sizes` says, under the layout of `overrides`."""
    return resolve(
        compose(
            [
                "hardware=cpu", "lr_schedule=constant", "train.eval_steps=0",
                f"parallel.micro_batch_size={sizes.micro_batch_size}", f"parallel.micro_batches={sizes.micro_batches}",
                f"model.num_layers={sizes.layers}", f"model.hidden_size={sizes.hidden}", f"model.num_heads={sizes.heads}",
                f"model.ffn_hidden_size={4 * sizes.hidden}", f"model.vocab_size={sizes.vocab}",
                f"model.max_seq_len={sizes.seq_len}", f"data.seq_len={sizes.seq_len}", "model.tie_embeddings=false",
                *overrides,
            ]
        )
    )  # fmt: skip


def our_step(trainer: Trainer) -> tuple[float, float]:
    """Loss and gradient norm of one step."""
    result = trainer.step()
    result.wait()
    return result.loss, result.grad_norm


# ---- ranks -----------------------------------------------------------------------------------------------


def start(measure: Callable[[Any], None], options: Any, ranks: int = RANKS) -> None:
    """Call `measure(options)` on `ranks` ranks of one thread each, with gloo as the default process group, and wait for them."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")  # before the ranks load torch
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (folder, measure, options, ranks), nprocs=ranks)


def measure_on_disk(measure: Callable[[Any], None], what: str | None, prefix: str) -> None:
    """Read the command line of a benchmark of files, and start its ranks: one, then two.

    measure: finds gpt_125m's sizes, or others, and an empty folder in the options. what: the help. prefix: how the folder's name begins.
    """
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.set_defaults(layers=12, hidden=768, heads=12, vocab=50304, seq_len=128, micro_batch_size=1, micro_batches=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder")
    options = parser.parse_args()
    parent = options.folder
    for ranks in options.ranks:
        options.folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        try:
            start(measure, options, ranks)
        finally:
            shutil.rmtree(options.folder)


def start_pairs(measure: Callable[[Pair], dict[str, Any]], options: Any, sides: Sequence[str]) -> dict[str, Any]:
    """Call `measure(pair)` on a pair of ranks for each of `sides`, all at once; what the pairs' first ranks return, in one."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    processes = len(sides) * RANKS
    with tempfile.TemporaryDirectory() as folder:
        turn = torch.multiprocessing.get_context("spawn").Barrier(processes)
        torch.multiprocessing.spawn(_run_pair, (folder, measure, options, sides, turn), nprocs=processes)
        results: dict[str, Any] = {}
        for side in sides:
            results |= json.loads(Path(folder, f"{side}.json").read_text())
        return results


@dataclass(frozen=True)
class Pair:
    """One side's ranks, among those that take turns with them."""

    side: str
    options: Any
    folder: Path
    turn: Any
    """A barrier of all ranks of all sides."""

    def share(self, names: Sequence[str], sides: Sequence[str]) -> list[str]:
        """What each side calls its ways, side after side: the order of the turns. Every rank calls this."""
        if dist.get_rank() == 0:
            (self.folder / f"{self.side}.names").write_text(json.dumps(list(names)))
        self.turn.wait(TIMEOUT_SECONDS)
        return [name for side in sides for name in json.loads((self.folder / f"{side}.names").read_text())]

    def take_turns(self, ways: Mapping[str, Callable[[], object]], names: Sequence[str], rounds: int) -> dict[str, list[float]]:
        """Seconds of each of this side's ways in each of `rounds` turns; the other sides' ranks wait meanwhile without computing."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in names:
                self.turn.wait(TIMEOUT_SECONDS)
                if name in ways:
                    barrier()
                    began = time.perf_counter()
                    ways[name]()
                    barrier()  # a turn lasts until the slower rank is done
                    seconds[name].append(time.perf_counter() - began)
        self.turn.wait(TIMEOUT_SECONDS)
        return seconds


def _run_pair(number: int, folder: str, measure: Callable[[Pair], dict[str, Any]], options: Any, sides: Sequence[str], turn: Any) -> None:
    pair = Pair(sides[number // RANKS], options, Path(folder), turn)

    def keep(_: Any) -> None:
        results = measure(pair)
        if dist.get_rank() == 0:
            (pair.folder / f"{pair.side}.json").write_text(json.dumps(results))

    (pair.folder / pair.side).mkdir(exist_ok=True)
    run_rank(number % RANKS, str(pair.folder / pair.side), keep, options)


def run_rank(rank: int, folder: str, measure: Callable[[Any], None], options: Any, ranks: int = RANKS) -> None:
    """Call `measure(options)` as one of so many ranks, of one thread, that meet in `folder`; ends this process."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    measure(options)
    barrier()
    os._exit(0)  # a gloo thread may abort a process that ends in the usual way


def barrier() -> None:
    """Wait for the other ranks without computing."""
    dist.barrier(group=dist.group.WORLD)


def say(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def mesh_of_one() -> Mesh:
    """A mesh of this rank alone. Every rank calls this."""
    rank = dist.get_rank()
    groups = [dist.new_subgroups_by_enumeration([[r] for r in range(dist.get_world_size())])[0] for _ in range(4)]
    dp_tp = DeviceMesh.from_group(groups[:2], CPU.type, mesh=torch.tensor([[rank]]), mesh_dim_names=("dp", "tp"))
    return Mesh(
        device=CPU, world=groups[0], tp=dp_tp["tp"], dp=dp_tp["dp"], dp_tp=dp_tp, pp_up=groups[2], pp_down=groups[3],
        embedding=None, pp_ranks=(rank,), ranks=[[[rank]]],
    )  # fmt: skip
