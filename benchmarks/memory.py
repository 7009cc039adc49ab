"""Memory a rank and loss curves of `experiment=memorize` at tp 1, 2 and 4: the table of docs/tensor_parallel.md.

python -m benchmarks.memory [--steps 200] [--tp 1 2 4]

8 layers, hidden 512, 8 heads, ffn 1024, vocabulary 1024, sequences of 32, batch 16, fp32, AdamW. Bytes are those of the tensors that a
rank holds, the largest over the ranks; the curves must be the same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from tptrain.cli import compose
from tptrain.config import Config, resolve
from tptrain.data.dataset import Data
from tptrain.data.memorize import random_tokens
from tptrain.mesh import build_mesh
from tptrain.tensor_parallel.parameter import local_part
from tptrain.trainer import Trainer

CPU = torch.device("cpu")
SHOWN_STEPS = (1, 50, 100, 150, 200)


def config_of(tp: int) -> Config:
    """The shipped experiment under one layout."""
    return resolve(compose(["experiment=memorize", "hardware=cpu", f"parallel.tp={tp}"]))


def bytes_of(tensors: list[Tensor]) -> int:
    """What this rank holds of some parameters, gradients or states."""
    return sum(local_part(tensor).numel() * tensor.element_size() for tensor in tensors)


def memory_of(trainer: Trainer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state on this rank; takes one step for it."""
    totals = trainer.compute_gradients()
    parameters = [p for _, p in trainer.share.named_parameters()]
    held = {"parameters": bytes_of(parameters), "gradients": bytes_of([p.grad for p in parameters if p.grad is not None])}
    trainer.update(totals)
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    return held | {"optimizer": bytes_of(states)}


def measure(rank: int, tp: int, steps: int, folder: str) -> None:
    """One rank: memory at the first step, then the curve. Rank 0 leaves the numbers in `folder`."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // tp))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{tp}", rank=rank, world_size=tp, timeout=timedelta(seconds=600))
    config = config_of(tp)
    tokens = random_tokens(config.data.num_sequences * config.data.seq_len + 1, config.data.vocab_size)
    mesh = build_mesh(config.parallel, CPU, 600)
    memory = memory_of(Trainer(config, mesh, Data.of_tokens(config, tokens)))
    largest = torch.tensor(list(memory.values()))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.world)
    trainer = Trainer(config, mesh, Data.of_tokens(config, tokens))
    losses = [trainer.step().loss for _ in range(steps)]
    end = trainer.evaluate()["val_loss"]
    if rank == 0:
        torch.save({"memory": largest, "losses": losses, "end": end}, Path(folder) / f"tp{tp}.pt")
    dist.barrier(group=mesh.world)
    os._exit(0)  # a gloo thread may abort a process that ends in the usual way


def main() -> None:
    """Run each layout and print the tables as markdown."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    options = arguments.parse_args()
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for tp in options.tp:
            torch.multiprocessing.spawn(measure, (tp, options.steps, folder), nprocs=tp)
            results[tp] = torch.load(Path(folder) / f"tp{tp}.pt", weights_only=True)
    first = results[options.tp[0]]
    print(f"| tp | parameters | gradients | optimizer state | sum | less than tp {options.tp[0]} |")
    print("|---|---|---|---|---|---|")
    for tp, result in results.items():
        sizes = [f"{size / 2**20:.2f} MiB" for size in (*result["memory"], result["memory"].sum())]
        print(f"| {tp} | {' | '.join(sizes)} | {1 - result['memory'].sum() / first['memory'].sum():.1%} |")
    shown = [step for step in SHOWN_STEPS if step <= options.steps]
    print(f"\n| tp | {' | '.join(f'step {step}' for step in shown)} | all, at the end | below 0.05 from step | largest difference |")
    print("|---" * (len(shown) + 4) + "|")
    for tp, result in results.items():
        apart = max(abs(loss - twin) for loss, twin in zip(result["losses"], first["losses"], strict=True))
        above = [step for step, loss in enumerate(result["losses"], start=1) if loss >= 0.05]
        losses = [f"{result['losses'][step - 1]:.5f}" for step in shown]
        print(f"| {tp} | {' | '.join(losses)} | {result['end']:.5f} | {above[-1] + 1} | {apart:.1e} |")


if __name__ == "__main__":
    main()
