"""Whether `tptrain plan hardware=auto` ranks layouts as they turn out on this machine.

python -m benchmarks.plan_time [--rounds 3] [--layers 8] [--hidden 512] ...

First this machine is measured, as the plan does it, and each layout's step is predicted. Then each layout trains: in every round each in
turn builds its model, takes a step that does not count and one that does; of the rounds the median. A group of two processes and one of
four take these turns, of one thread each; whoever is not training waits without computing. Every layout trains the same batch: fp32,
AdamW, clipping, nothing compiled.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.agreement import kendall_tau
from benchmarks.two_ranks import CPU, TIMEOUT_SECONDS, Sizes, add_sizes, barrier, config_of, mesh_of_one, run_rank
from tptrain import this_machine
from tptrain.config import Config
from tptrain.data.dataset import Data
from tptrain.host_memory import keep_freed_memory
from tptrain.mesh import Mesh, build_mesh
from tptrain.plan.pipeline import describe
from tptrain.plan.time import StepTime, step_time
from tptrain.trainer import Trainer

TAU_GOAL, BEST_GOAL = 0.7, 0.10
PARTS = ("computing", "tp", "pp", "dp", "the rest", "waiting")
SEQUENCES = 8
"""Of a step: all layouts train as many."""
LAYOUTS = {
    "single": "",
    "single, recompute full": "recompute=full",
    "tp2": "tp=2",
    "tp2, sequence parallel": "tp=2 sequence_parallel=true",
    "tp2, recompute full": "tp=2 recompute=full",
    "dp2": "dp=2",
    "pp2 1f1b even": "pp=2 partition=even",
    "pp2 1f1b": "pp=2",
    "pp2 1f1b, 2 micro-batches": "pp=2 micro_batch_size=4",
    "pp2 gpipe": "pp=2 schedule=gpipe",
    "pp2 zb_h1": "pp=2 schedule=zb_h1",
    "pp2 interleaved even": "pp=2 schedule=interleaved partition=even",
    "tp2 pp2": "tp=2 pp=2",
    "tp2 dp2": "tp=2 dp=2",
}
"""Keys of `parallel`; four micro-batches where they name no other size, and the layers balanced."""


@dataclass(frozen=True)
class Options(Sizes):
    """The command line."""

    rounds: int


def parse() -> Options:
    """The options of the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    add_sizes(arguments)
    arguments.set_defaults(seq_len=128)
    return Options(**vars(arguments.parse_args()))


def layout_config(options: Options, keys: str, hardware: str) -> Config:
    """A layout's config."""
    own = [f"parallel.{key}" for key in keys.split()]
    return config_of(options, "parallel.micro_batch_size=2", f"train.global_batch_size={SEQUENCES}", f"hardware={hardware}",
                     "launch.threads_per_rank=1", *own)  # fmt: skip


def predict(options: Options) -> dict[str, StepTime]:
    """Each layout's step, on this machine as it measures now."""
    steps = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for name, keys in LAYOUTS.items():
            config = layout_config(options, keys, "auto")
            config = this_machine.measured(config, config.processes)
            steps[name] = step_time(config, describe(config))
    return steps


# ---- training --------------------------------------------------------------------------------------------


def take_turns(number: int, folder: str, options: Options, turn: Any) -> None:
    """One process: of the group of two, or of that of four."""
    world, rank = (2, number) if number < 2 else (4, number - 2)

    def work(_: Any) -> None:
        keep_freed_memory()
        seconds = measure(options, world, turn)
        if rank == 0:
            Path(folder, f"{world}.json").write_text(json.dumps(seconds))

    (own := Path(folder, str(world))).mkdir(exist_ok=True)
    run_rank(rank, str(own), work, options, world)


def measure(options: Options, world: int, turn: Any) -> dict[str, list[float]]:
    """Seconds of a step of each layout of this group's processes, in each round. A single process is the first of the two."""
    tokens = np.random.default_rng(0).integers(0, options.vocab, 100_000)
    alone = mesh_of_one()
    meshes: dict[tuple[int, ...], Mesh] = {}
    seconds: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, keys in LAYOUTS.items():
            turn.wait(TIMEOUT_SECONDS)
            config = layout_config(options, keys, "cpu")
            if max(config.processes, 2) != world:
                continue
            grid = (config.parallel.tp, config.parallel.pp, int(config.parallel.dp))
            if grid not in meshes:
                meshes[grid] = alone if config.processes == 1 else build_mesh(config.parallel, CPU, TIMEOUT_SECONDS)
            if config.processes > 1 or dist.get_rank() == 0:
                taken = step_seconds(config, meshes[grid], tokens)
                seconds.setdefault(name, []).append(taken)
    turn.wait(TIMEOUT_SECONDS)
    return seconds


def step_seconds(config: Config, mesh: Mesh, tokens: np.ndarray) -> float:
    """Of the second step of a new trainer."""
    trainer = Trainer(config, mesh, Data.of_tokens(config, tokens))
    for _ in range(2):
        if config.processes > 1:
            barrier()
        began = time.perf_counter()
        trainer.step().wait()
        taken = time.perf_counter() - began
    trainer.close()
    del trainer
    gc.collect()
    return taken


def run(options: Options) -> dict[str, float]:
    """Median seconds of a step of each layout."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        turn = torch.multiprocessing.get_context("spawn").Barrier(6)
        torch.multiprocessing.spawn(take_turns, (folder, options, turn), nprocs=6)
        found = {name: values for world in (2, 4) for name, values in json.loads(Path(folder, f"{world}.json").read_text()).items()}
    return {name: statistics.median(found[name]) for name in LAYOUTS}


# ---- what came out ---------------------------------------------------------------------------------------


def report(options: Options, predicted: dict[str, StepTime], measured: dict[str, float]) -> None:
    """Print the table, and whether the goals are met."""
    tokens = SEQUENCES * options.seq_len
    print("| layout | predicted tokens/s | measured | predicted over measured |")
    print("|---|---|---|---|")
    for name in sorted(measured, key=measured.__getitem__):
        rate = tokens / measured[name]
        print(f"| {name} | {predicted[name].tokens_per_second:.0f} | {rate:.0f} | {predicted[name].tokens_per_second / rate:.2f} |")
    tau = kendall_tau([predicted[name].step_seconds for name in LAYOUTS], [measured[name] for name in LAYOUTS])
    best = min(predicted, key=lambda name: predicted[name].step_seconds)
    behind = 1 - min(measured.values()) / measured[best]
    print(f"\nKendall's tau {tau:.2f} over {len(measured)} layouts; at least {TAU_GOAL} wanted: {'met' if tau >= TAU_GOAL else 'MISSED'}")
    verdict = "met" if behind <= BEST_GOAL else "MISSED"
    print(f"the predicted best, {best}, is {behind:.1%} slower than the measured best; at most {BEST_GOAL:.0%} wanted: {verdict}")


if __name__ == "__main__":
    chosen = parse()
    steps = predict(chosen)
    for name, step in steps.items():
        parts = (step.compute_seconds, step.tp_seconds, step.pp_seconds, step.dp_seconds, step.other_seconds, step.bubble_seconds)
        text = ", ".join(f"{part} {seconds:.3f}" for part, seconds in zip(PARTS, parts, strict=True))
        print(f"{name}: {step.step_seconds:.3f} s: {text}", flush=True)
    report(chosen, steps, run(chosen))
