"""fp32 against bf16 training of gpt_125m on this machine, one process.

python -m benchmarks.precision [--rounds 3] [--threads 2] [--seq-len 1024]
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
from tptrain.data.dataset import Data
from tptrain.mesh import build_mesh
from tptrain.trainer import Trainer

MICRO_BATCHES = 2


def trainer(precision: str, seq_len: int) -> Trainer:
    """gpt_125m on random tokens: 2 micro-batches of one sequence a step."""
    size = [f"data.seq_len={seq_len}", "parallel.micro_batch_size=1", f"parallel.micro_batches={MICRO_BATCHES}", "train.eval_steps=0"]
    config = resolve(compose(["model=gpt_125m", "hardware=cpu", f"train.precision={precision}", *size]))
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 100_000)
    return Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, tokens))


def main() -> None:
    """Print seconds a step, tokens a second and the ratio."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--seq-len", type=int, default=1024)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainers = {precision: trainer(precision, options.seq_len) for precision in ("fp32", "bf16")}
    seconds = alternate({name: lambda t=t: t.step().wait() for name, t in trainers.items()}, options.rounds)  # type: ignore[misc]
    for name, value in seconds.items():
        print(f"gpt_125m {name}: {value:.2f} s a step, {MICRO_BATCHES * options.seq_len / value:.0f} tokens/s")
    print(f"bf16 is {seconds['fp32'] / seconds['bf16']:.2f}x as fast as fp32")
    os._exit(0)


if __name__ == "__main__":
    main()
