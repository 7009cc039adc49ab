"""Tensor parallelism on two CPU processes: tptrain's against PyTorch's own (DTensor, `parallelize_module`), and against one process.

python -m benchmarks.tensor_parallel [--rounds 4] [--sequence-parallel | --no-sequence-parallel] [--layers 8] [--hidden 512] ...

Each process computes with one thread. First both sides do one step from the same weights on the same batch and must report the
same loss and gradient norm, and a second step the same loss, which then depends on the first one's update. Then all ways take
turns: one process alone (the other waits at a barrier), ours, DTensor's, with and without sequence parallelism. fp32, AdamW
(fused on both sides), gradient clipping on both sides, nothing compiled.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.alternate import alternate
from benchmarks.dtensor_trainer import DTensorTrainer
from benchmarks.two_ranks import CPU, RANKS, TIMEOUT_SECONDS, Sizes, add_sizes, barrier, config_of, mesh_of_one, our_step, say, start
from tests.tensor_parallel.support import collectives
from tptrain.config import Config
from tptrain.data.dataset import Data
from tptrain.data.sampler import Sampler
from tptrain.mesh import Mesh, build_mesh
from tptrain.trainer import Trainer

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-3
"""Relative. DTensor's norm adds the squares of millions of elements in fp32 on the CPU, which is off in the fourth digit; ours is not."""


@dataclass(frozen=True)
class Options(Sizes):
    """The command line."""

    rounds: int
    sequence_parallel: bool | None

    @property
    def variants(self) -> list[bool]:
        """Without and with sequence parallelism, as asked."""
        return [False, True] if self.sequence_parallel is None else [self.sequence_parallel]


def parse() -> Options:
    """The options of the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction, help="one variant alone; without it, both")
    add_sizes(arguments)
    return Options(**vars(arguments.parse_args()))


# ---- the three ways --------------------------------------------------------------------------------------


def layout(options: Options, tp: int, sequence_parallel: bool) -> Config:
    """The GPT of `options` under tp."""
    return config_of(options, f"parallel.tp={tp}", f"parallel.sequence_parallel={str(sequence_parallel).lower()}")


def both_sides(config: Config, mesh: Mesh, tokens: np.ndarray) -> tuple[Trainer, DTensorTrainer]:
    """Our trainer and DTensor's, with the same weights."""
    ours = Trainer(config, mesh, Data.of_tokens(config, tokens))
    weights = {name: parameter.full_tensor() for name, parameter in ours.share.stages[0].state_dict().items()}
    data = Sampler(tokens, config.data.seq_len, config.seed)
    return ours, DTensorTrainer(config, init_device_mesh("cpu", (RANKS,)), weights, data)


def their_step(trainer: DTensorTrainer) -> tuple[float, float]:
    """Loss and gradient norm of one step."""
    loss, norm = trainer.step()
    return loss.item(), norm.item()


# ---- equal work ------------------------------------------------------------------------------------------


def check_equal_work(label: str, our: Callable[[], tuple[float, float]], their: Callable[[], tuple[float, float]]) -> None:
    """Two steps of each side, with the same losses and norms. Raises AssertionError where they differ."""
    for step in (1, 2):
        (loss, norm), (their_loss, their_norm) = our(), their()
        say(f"{label} step {step}: loss {loss:.7f} ours, {their_loss:.7f} DTensor; gradient norm {norm:.6f} ours, {their_norm:.6f} DTensor")
        assert abs(loss - their_loss) <= LOSS_TOLERANCE * abs(loss), "the losses differ"
        assert abs(norm - their_norm) <= NORM_TOLERANCE * norm, "the gradient norms differ"


def count_collectives(label: str, ours: Trainer, theirs: DTensorTrainer) -> None:
    """Print what one micro-batch sends, and what a whole step does."""
    config = ours.config
    batch = torch.from_numpy(theirs.data.rows(0, config.parallel.micro_batch_size))
    inputs, targets = batch[:, :-1], batch[:, 1:]
    with collectives() as our_counts:
        ours.share.stages[0](inputs, targets).backward()
    with collectives() as their_counts:
        theirs.micro_batch(inputs, targets, targets.numel())
    for trainer in (ours, theirs):
        trainer.optimizer.zero_grad()
    with collectives() as our_step_counts:
        ours.step()
    with collectives() as their_step_counts:
        theirs.step()
    for unit, counts in (("micro-batch", (our_counts, their_counts)), ("step", (our_step_counts, their_step_counts))):
        say(f"{label} collectives a {unit}: ours {text_of(counts[0])}; DTensor {text_of(counts[1])}")


def text_of(counts: dict[str, int]) -> str:
    """`34 allreduce, 1 broadcast`."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


# ---- ranks -----------------------------------------------------------------------------------------------


def measure(options: Options) -> None:
    """One rank's part: build all ways, check them, take turns; rank 0 prints."""
    # full_tensor() is slow, which is fine while the sides are built
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    tokens = np.random.default_rng(0).integers(0, options.vocab, 100_000 + options.tokens)
    ways: dict[str, Callable[[], object]] = {"one process": lambda: None}
    alone = mesh_of_one()
    if dist.get_rank() == 0:
        config = layout(options, 1, False)
        single = Trainer(config, alone, Data.of_tokens(config, tokens))
        ways["one process"] = partial(our_step, single)
        say("one process step 1: loss {:.7f}; gradient norm {:.6f}".format(*our_step(single)))
    for sequence_parallel in options.variants:
        label = "tp2 sequence-parallel" if sequence_parallel else "tp2"
        config = layout(options, RANKS, sequence_parallel)
        ours, theirs = both_sides(config, build_mesh(config.parallel, CPU, TIMEOUT_SECONDS), tokens)
        ways[f"{label} ours"], ways[f"{label} DTensor"] = partial(our_step, ours), partial(their_step, theirs)
        check_equal_work(label, ways[f"{label} ours"], ways[f"{label} DTensor"])  # type: ignore[arg-type]
        count_collectives(label, ours, theirs)
    seconds = alternate(ways, options.rounds, warmup=0, before=barrier)  # the checks have warmed everything up
    report(options, seconds)


def report(options: Options, seconds: dict[str, float]) -> None:
    """Print tokens a second of each way and the ratios."""
    for name, value in seconds.items():
        say(f"{name}: {value:.2f} s a step, {options.tokens / value:.0f} tokens/s, {seconds['one process'] / value:.2f}x one process")
    for name in [name.removesuffix(" ours") for name in seconds if name.endswith(" ours")]:
        say(f"{name}: ours is {seconds[f'{name} DTensor'] / seconds[f'{name} ours']:.3f}x as fast as DTensor")


if __name__ == "__main__":
    start(measure, parse())
