"""Memory that a rank is certain to need, without its list of actions: what does not fit by it need not be walked.

Counted are the weights with all that belongs to them, and what blocks keep of as many micro-batches as a schedule surely keeps at once when
its first backward begins:

    gpipe         all m of each stage
    1f1b, zb_h1   rank r: min(m, p - r)
    interleaved   rank r: min(m v, (v - 1) p + 2 (p - 1 - r) + 1) of one stage or another
    zb_v          rank 0: the forwards that it has time for until the first micro-batch is back from the other ranks

Left out are embedding, head and loss, messages, and what computations need beside what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.plan.memory import GPU_MARGIN
from tptrain.plan.stage_memory import StageMemory


@dataclass(frozen=True)
class Weights:
    """What each rank holds whatever its micro-batches are."""

    held: list[int]
    """Bytes of weights, optimizer state and gathered weights."""
    gradients: list[int]
    """Bytes of the gradients of the rank's smallest stage, at its first backward's end."""
    layers: list[int]
    """Of the rank's shortest stage."""
    others: int
    """zb_v: layers between the first rank's stages, for each of its first stage's, rounded down."""


def weights_of(ranks: Sequence[int], layers: Sequence[int], stages: Sequence[StageMemory]) -> Weights:
    """ranks, layers, stages: of each stage its rank, its number of layers, and its memory, of which only weights count."""
    pp = max(ranks) + 1
    held, gradients, shortest = [0] * pp, [0] * pp, [0] * pp
    for rank, count, stage in zip(ranks, layers, stages, strict=True):
        held[rank] += stage.parameters + stage.optimizer + stage.copies + stage.gathered_weights
        whole = stage.gathered_gradients or stage.gradients
        gradients[rank] = min(gradients[rank] or whole, whole)
        shortest[rank] = min(shortest[rank] or count, count)
    return Weights(held, gradients, shortest, sum(layers[1:-1]) // layers[0])


def least_bytes(config: Config, weights: Weights, block: int) -> float:
    """Of the fullest rank of a resolved config. block: bytes that a block keeps of a micro-batch."""
    whole = not config.parallel.schedule.startswith("zb_") and config.parallel.micro_batches > 1
    most = 0.0
    for rank, (held, gradients, layers) in enumerate(zip(weights.held, weights.gradients, weights.layers, strict=True)):
        kept = live_stages(config, weights, rank) * layers * block
        most = max(most, held + (max(kept, kept - layers * block + gradients) if whole else kept))
    return most * (1 + GPU_MARGIN * (config.hardware.device != "cpu"))


def live_stages(config: Config, weights: Weights, rank: int) -> int:
    """Activations that a rank keeps at once, at least, when a backward begins; those of one stage and one micro-batch count as one."""
    parallel = config.parallel
    p, v, m = parallel.pp, int(parallel.stages_per_rank), parallel.micro_batches
    if parallel.schedule == "gpipe":
        return m * v
    if parallel.schedule == "interleaved":
        return min(m * v, (v - 1) * min(m, p) + 2 * (p - 1 - rank) + 1)
    if parallel.schedule == "zb_v":
        return max(1, min(m, 2 * p - 1, weights.others)) if rank == 0 else 1
    return min(m, p - rank)
