"""What layouts need and take, with everything worked out once that many of them share.

What a stage takes depends on tp, the micro-batch, recomputation and sequence parallelism, and on its layers; which layers a stage has
depends on pp and the schedule. Thousands of layouts are combinations of a few hundred of either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tptrain.config import Config
from tptrain.pipeline.actions import Schedule, placement, with_transfers
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs
from tptrain.pipeline.zero_bubble import zb_v
from tptrain.plan.activations import Sizes, block_memory
from tptrain.plan.bound import least_seconds
from tptrain.plan.communication import message_bytes
from tptrain.plan.layouts import Layout, Layouts
from tptrain.plan.least_memory import Weights, least_bytes, walked_bytes, weights_of
from tptrain.plan.links import collective_seconds, group_links
from tptrain.plan.memory import largest
from tptrain.plan.peak import enough_micro_batches
from tptrain.plan.pipeline import PipelinePlan, StagePlan, plan_of, stage_costs, stage_layers
from tptrain.plan.stage_memory import StageMemory, stage_memory
from tptrain.plan.stage_time import Clock, StageTime
from tptrain.plan.time import Step

T = TypeVar("T")
Kind = tuple[int, bool, bool]
"""What makes stages alike: how many layers, whether the first one is among them, whether the last one."""


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline."""

    ranks: list[int]
    """Of each stage."""
    bounds: list[tuple[int, int]]
    """Its layers, as (first, one past last)."""
    kinds: dict[Kind, tuple[int, int]]
    """Of stages that are alike the layers of one."""
    kind_of: list[Kind]
    """Of each stage."""


class Prices:
    """Of the layouts of one search. Raises ConfigError where the hardware's speed is unknown."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self._known: dict[Hashable, Any] = {}

    def config(self, layout: Layout) -> Config:
        """Resolved."""
        return self.layouts.config(layout)

    def least_seconds(self, layout: Layout, config: Config) -> float:
        """What a step certainly takes in its pipeline."""
        stages, splits = self._stages(layout, config), layout.schedule.startswith("zb_")
        times = self._times(layout, config, stages)
        costs = Costs(
            [time.forward + time.forward_tp for time in times],
            [time.input_gradient + (time.input_gradient_tp if splits else time.backward_tp) for time in times],
            [time.weight_gradient for time in times],
            self._transfer(layout, config),
        )
        return least_seconds(stages.ranks, config.parallel.micro_batches, costs, splits)

    def outside_seconds(self, layout: Layout, config: Config) -> float:
        """What a step takes besides its pipeline."""
        stages = self._stages(layout, config)
        plans = [StagePlan(rank, *bounds, 0, 0) for rank, bounds in zip(stages.ranks, stages.bounds, strict=True)]
        step = Step(config, plans, layout.schedule.startswith("zb_"), self._times(layout, config, stages))
        own = (layout.tp, layout.pp, layout.schedule, layout.stages_per_rank, layout.sequence_parallel)
        return step.dp_seconds() + self._once(("other", *own), step.other_seconds)

    def least_bytes(self, layout: Layout, config: Config) -> float:
        """What the fullest rank certainly needs, for its weights and what its blocks keep."""
        own, weights = (layout.tp, layout.micro_batch_size, layout.recompute, layout.sequence_parallel), self._weights(layout, config)
        block = self._once(("block", *own), lambda: block_memory(config, Sizes.of(config)).kept)
        return least_bytes(config, weights, [layers * block for layers in weights.layers])

    def likely_bytes(self, layout: Layout, config: Config) -> float:
        """What it certainly needs, with all that its stages keep and a backward needs besides: close to what it needs in the end."""
        stages, known = self._stages(layout, config), self._memory(layout, config)
        kept, extra = [math.inf] * layout.pp, [math.inf] * layout.pp
        for rank, kind in zip(stages.ranks, stages.kind_of, strict=True):
            kept[rank], extra[rank] = min(kept[rank], known[kind].activations), min(extra[rank], known[kind].backward_extra)
        return least_bytes(config, self._weights(layout, config), kept, extra)

    def bytes_of_fullest(self, layout: Layout, config: Config, limit: float = math.inf) -> float:
        """What the fullest rank needs; of one that surely needs more than the limit, if any does."""
        stages, known = self._stages(layout, config), self._memory(layout, config)
        memory = [known[kind] for kind in stages.kind_of]
        first = {number: memory[number] for number, rank in enumerate(stages.ranks) if rank == 0}
        most = walked_bytes(config, self._short(layout, config)[0], first)
        if most > limit:
            return most
        most = 0.0
        for rank, actions in enumerate(self._actions(layout, config)):
            most = max(most, largest(config, memory, stages.ranks, rank, actions).total)
            if most > limit:
                break
        return most

    def pipeline(self, layout: Layout, config: Config) -> PipelinePlan:
        """As `describe` has it, without its proof: the schedules that have names are proved in the tests."""
        m = config.parallel.micro_batches
        return self._once(
            ("pipeline", *_made_for(layout), m),
            lambda: plan_of(config, self._schedule(layout, config, m)),
        )

    # ---- what layouts share --------------------------------------------------------------------------------

    def _schedule(self, layout: Layout, config: Config, micro_batches: int) -> Schedule:
        sizes = (layout.pp, layout.stages_per_rank, micro_batches)
        if layout.schedule == "zb_v":
            return zb_v(*sizes, stage_costs(config, self._stages(layout, config).bounds))
        return SCHEDULES[layout.schedule](*sizes)

    def _short(self, layout: Layout, config: Config) -> Schedule:
        """With no more micro-batches than make the memory what it is."""
        m = enough_micro_batches(layout.schedule, layout.pp, config.parallel.micro_batches)
        return self._once(("short", *_made_for(layout), m), lambda: self._schedule(layout, config, m))

    def _actions(self, layout: Layout, config: Config) -> Schedule:
        """The same with transfers."""
        m = enough_micro_batches(layout.schedule, layout.pp, config.parallel.micro_batches)
        return self._once(("actions", *_made_for(layout), m), lambda: with_transfers(self._short(layout, config)))

    def _stages(self, layout: Layout, config: Config) -> Stages:
        def made() -> Stages:
            ranks = placement(SCHEDULES[layout.schedule](layout.pp, layout.stages_per_rank, 1))
            bounds, layers = stage_layers(config, ranks), config.model.num_layers
            kind_of = [(last - first, first == 0, last == layers) for first, last in bounds]
            return Stages(ranks, bounds, dict(zip(kind_of, bounds, strict=True)), kind_of)

        return self._once(("stages", layout.pp, layout.schedule, layout.stages_per_rank), made)

    def _times(self, layout: Layout, config: Config, stages: Stages) -> list[StageTime]:
        own = (layout.tp, layout.micro_batch_size, layout.recompute, layout.sequence_parallel)
        clock = self._once(("clock", *own), lambda: Clock(config))
        known: dict[Kind, StageTime] = self._once(("times", *own), dict)
        for kind in stages.kinds.keys() - known.keys():
            known[kind] = clock.stage(*kind)
        return [known[kind] for kind in stages.kind_of]

    def _memory(self, layout: Layout, config: Config) -> dict[Kind, StageMemory]:
        return {kind: stage_memory(config, *bounds) for kind, bounds in self._stages(layout, config).kinds.items()}

    def _weights(self, layout: Layout, config: Config) -> Weights:
        def made() -> Weights:
            stages, own = self._stages(layout, config), ("memory", layout.tp, layout.pp)
            known = {kind: self._once((*own, kind), partial(stage_memory, config, *bounds)) for kind, bounds in stages.kinds.items()}
            layers = [last - first for first, last in stages.bounds]
            return weights_of(stages.ranks, layers, [known[kind] for kind in stages.kind_of])

        return self._once(("weights", layout.tp, layout.pp, layout.schedule, layout.stages_per_rank), made)

    def _transfer(self, layout: Layout, config: Config) -> float:
        if layout.pp == 1:
            return 0.0
        link = self._once(("link", layout.tp, layout.pp), lambda: group_links(config)["pp_up"])
        return collective_seconds("send", 2, message_bytes(config), link)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made the first time that it is asked for."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found


def _made_for(layout: Layout) -> tuple[Hashable, ...]:
    """What a schedule depends on besides its micro-batches; zb_v heeds what stages cost, of which recomputation is a part."""
    return layout.schedule, layout.pp, layout.stages_per_rank, layout.recompute
