"""fp32 against bf16 training of gpt_125m on this machine, one process.

python -m benchmarks.precision [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.alternate import alternate
from tptrain.cli import compose
from tptrain.config import resolve
from tptrain.mesh import build_mesh
from tptrain.trainer import Trainer


def trainer(precision: str) -> Trainer:
    """gpt_125m with random tokens: 4 micro-batches of 1 x 512 tokens a step."""
    overrides = ["model=gpt_125m", "data.seq_len=512", "parallel.micro_batch_size=1", "parallel.micro_batches=4", "train.eval_steps=0"]
    config = resolve(compose([*overrides, f"train.precision={precision}", "hardware=cpu"]))
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 100_000)
    return Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), tokens, tokens)


def main() -> None:
    """Print seconds a step, tokens a second and the ratio."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainers = {precision: trainer(precision) for precision in ("fp32", "bf16")}
    seconds = alternate({name: lambda t=t: t.step().wait() for name, t in trainers.items()}, options.rounds)  # type: ignore[misc]
    for name, value in seconds.items():
        print(f"gpt_125m {name}: {value:.2f} s a step, {4 * 512 / value:.0f} tokens/s")
    print(f"bf16 is {seconds['fp32'] / seconds['bf16']:.2f}x as fast as fp32")
    os._exit(0)


if __name__ == "__main__":
    main()
