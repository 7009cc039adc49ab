"""The memory of a rank in one training step, by component, at the moment when it is largest.

    all the time      fp32 parameters, optimizer state, from the first forward on bf16 copies of the weights
    grows             gradients: each stage's from its first backward on
    comes and goes    what micro-batches keep from forward to backward (`activations.py`), in the order of the schedule's actions
                      (`live.py`); messages; what the computation at hand needs beside

Sizes are those of tensors. On a GPU the allocator needs somewhat more: `margin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.pipeline.actions import Action, with_transfers
from tptrain.plan.live import moments
from tptrain.plan.pipeline import PipelinePlan
from tptrain.plan.stage_memory import StageMemory, batch_bytes
from tptrain.plan.stage_memory import stage_memory as stage_memory

GPU_MARGIN = 0.05
"""Of all tensors: what an allocator on a GPU keeps beyond them, as blocks that are free but too small or in pieces."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a pipeline rank, of the tp rank that holds the most, when they are the most."""

    pp_rank: int
    parameters: int
    """fp32 weights, 1/dp of them."""
    gradients: int
    """fp32 sums, 1/dp of them."""
    optimizer: int
    copies: int
    """bf16 weights, with dp=1."""
    gathered: int
    """With dp>1: weights and gradients whole."""
    activations: int
    """What micro-batches keep until their backward, and until their weight gradients."""
    extra: int
    """What the computation at the peak needs beside."""
    buffers: int
    """Messages on their way or received, the batch, memory kept for logits."""
    margin: int
    """For fragments, on a GPU."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value for name, value in vars(self).items() if name != "pp_rank")


def rank_memory(config: Config, pipeline: PipelinePlan) -> list[RankMemory]:
    """Of each pipeline rank of a resolved config, its whole list of actions walked."""
    stages = [stage_memory(config, stage.first_layer, stage.last_layer) for stage in pipeline.stages]
    ranks = [stage.rank for stage in pipeline.stages]
    return [largest(config, stages, ranks, rank, actions) for rank, actions in enumerate(with_transfers(pipeline.schedule))]


def largest(config: Config, stages: Sequence[StageMemory], ranks: Sequence[int], pp_rank: int, actions: Sequence[Action]) -> RankMemory:
    """The largest moment of a rank's actions, with what the rank holds all the time. stages, ranks: of the whole pipeline."""
    own = [stage for stage, rank in zip(stages, ranks, strict=True) if rank == pp_rank]
    worst = max(moments(actions, stages, ranks), key=lambda moment: moment.total)
    parameters, optimizer = sum(stage.parameters for stage in own), sum(stage.optimizer for stage in own)
    copies, batch = sum(stage.copies for stage in own), batch_bytes(config, any(stage.is_end for stage in own))
    tensors = parameters + optimizer + copies + batch + worst.total
    return RankMemory(
        pp_rank=pp_rank,
        parameters=parameters,
        gradients=worst.gradients,
        optimizer=optimizer,
        copies=copies,
        gathered=worst.gathered,
        activations=worst.activations,
        extra=worst.extra,
        buffers=worst.buffers + batch,
        margin=round(margin_share(config) * tensors),
    )


def margin_share(config: Config) -> float:
    """What a rank needs beyond its tensors, as a share of them."""
    return GPU_MARGIN if config.hardware.device != "cpu" else 0.0
