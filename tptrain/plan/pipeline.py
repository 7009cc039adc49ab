"""The pipeline of a config, priced in FLOPs: what each stage holds, how long the ranks idle, how many activations they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tptrain.config import Config
from tptrain.model.flops import attention_flops, block_flops, head_flops, stage_parameters
from tptrain.pipeline.actions import COMPUTATIONS, Schedule, placement
from tptrain.pipeline.load import load_schedule
from tptrain.pipeline.partition import partition
from tptrain.pipeline.simulate import Costs, Simulation, simulate
from tptrain.pipeline.zero_bubble import zb_v


@dataclass(frozen=True)
class StagePlan:
    """One stage of the pipeline."""

    rank: int
    """The pipeline rank that holds it."""
    first_layer: int
    last_layer: int
    """One past its last."""
    parameters: int
    """Over all its tp ranks."""
    forward_flops_per_token: int
    """FLOPs of one token's forward."""


@dataclass(frozen=True)
class PipelinePlan:
    """What the pipeline of a config will be."""

    stages: list[StagePlan]
    """In the order of the layers."""
    schedule: Schedule
    """The computations of each rank."""
    costs: Costs
    """FLOPs of one token on each stage."""

    @cached_property
    def _step(self) -> Simulation:
        return simulate(self.schedule, self.costs)

    @property
    def bubble_fraction(self) -> float:
        """The share of the ranks' time in which they do not compute, if FLOPs were all that took time."""
        return self._step.bubble_fraction

    @property
    def peaks(self) -> list[int]:
        """Of each rank the most live activations: those that one stage keeps of one micro-batch count as one."""
        return self._step.peaks


def describe(config: Config) -> PipelinePlan:
    """The plan of a resolved config's pipeline. Raises ConfigError for a schedule file that cannot run."""
    return plan_of(config, [[action for action in actions if action.kind in COMPUTATIONS] for actions in schedule_of(config)])


def plan_of(config: Config, schedule: Schedule) -> PipelinePlan:
    """The plan of a resolved config under this schedule of computations."""
    ranks = placement(schedule)
    bounds = stage_layers(config, ranks)
    stages = [
        StagePlan(rank, first, last, stage_parameters(config.model, first, last), forward_flops_per_token(config, first, last))
        for rank, (first, last) in zip(ranks, bounds, strict=True)
    ]
    return PipelinePlan(stages, schedule, stage_costs(config, bounds))


def schedule_of(config: Config) -> Schedule:
    """The schedule of a resolved config, with transfers; zb_v is made for what the config's stages cost. Raises ConfigError as
    `load_schedule` does."""
    return load_schedule(config.parallel, costs_for_schedule(config))


def costs_for_schedule(config: Config) -> Costs | None:
    """What a schedule that is made for the stages' costs has to know, of a resolved config: `zb_v`."""
    if config.parallel.schedule != "zb_v":
        return None
    ranks = placement(zb_v(config.parallel.pp, int(config.parallel.stages_per_rank), micro_batches=1))
    return stage_costs(config, stage_layers(config, ranks))


def stage_costs(config: Config, bounds: Sequence[tuple[int, int]]) -> Costs:
    """FLOPs of one token on each stage. bounds: its layers. Attention's backward makes input gradients alone."""
    forward = [forward_flops_per_token(config, *layers) for layers in bounds]
    attention = [(last - first) * attention_flops(config.model, config.data.seq_len) for first, last in bounds]
    again = [recomputed_flops_per_token(config, *layers) for layers in bounds]
    inputs = [flops + extra + made for flops, extra, made in zip(forward, attention, again, strict=True)]
    return Costs(forward, inputs, [flops - extra for flops, extra in zip(forward, attention, strict=True)])


def stage_layers(config: Config, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """The layers of each stage, as (first, one past last), as `parallel.partition` asks. ranks: of each stage."""
    model = config.model
    block = block_flops(model, config.data.seq_len)
    return partition(config.parallel.partition, model.num_layers, ranks, block, first=0, last=head_flops(model))


def forward_flops_per_token(config: Config, first_layer: int, last_layer: int) -> int:
    """FLOPs of one token's forward through a stage; the embedding's are none."""
    head = head_flops(config.model) if last_layer == config.model.num_layers else 0
    return (last_layer - first_layer) * block_flops(config.model, config.data.seq_len) + head


def recomputed_flops_per_token(config: Config, first_layer: int, last_layer: int) -> int:
    """FLOPs of what a stage's backward makes again: with recompute=full the blocks, with loss_chunk_tokens the logits."""
    blocks = (last_layer - first_layer) * block_flops(config.model, config.data.seq_len)
    head = head_flops(config.model) if last_layer == config.model.num_layers else 0
    return blocks * (config.parallel.recompute == "full") + head * (config.train.loss_chunk_tokens is not None)
