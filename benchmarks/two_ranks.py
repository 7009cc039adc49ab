"""What the benchmarks on two CPU processes share: the model and the batch, starting the ranks, a mesh of one, a step, a line of output."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
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


def start(measure: Callable[[Any], None], options: Any) -> None:
    """Call `measure(options)` on two ranks of one thread each, with gloo as the default process group, and wait for them."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")  # before the ranks load torch
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (folder, measure, options), nprocs=RANKS)


def _run(rank: int, folder: str, measure: Callable[[Any], None], options: Any) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    measure(options)
    barrier()
    os._exit(0)  # a gloo thread may abort a process that ends in the usual way


def barrier() -> None:
    """Wait for the other rank without computing."""
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
