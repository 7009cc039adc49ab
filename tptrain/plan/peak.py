"""The memory of a rank without the whole schedule, for a search that asks of thousands of layouts.

A rank's memory depends on its own list of actions alone, and not on how many micro-batches there are, from some number on: until its first
backward a schedule runs ahead by a number of forwards that the pipeline's depth bounds, and after that repeats itself. gpipe is the
exception: it keeps all of them, and each adds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from tptrain.config import Config
from tptrain.pipeline.actions import Action, Schedule, receive_before, sends_after
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs
from tptrain.pipeline.zero_bubble import zb_v
from tptrain.plan.memory import RankMemory, largest
from tptrain.plan.pipeline import stage_costs
from tptrain.plan.stage_memory import StageMemory


def peak_of(config: Config, stages: Sequence[StageMemory], ranks: Sequence[int], pp_rank: int) -> RankMemory:
    """The memory of one pipeline rank under a schedule that has a name, as `rank_memory` gives it. stages, ranks: of the whole pipeline."""
    parallel = config.parallel
    each, costs = int(parallel.stages_per_rank), None
    if parallel.schedule == "zb_v":
        prices = stage_costs(config, [stage.layers for stage in stages])
        costs = (tuple(prices.forward), tuple(prices.input_gradient), tuple(prices.weight_gradient))
    walked = enough_micro_batches(parallel.schedule, parallel.pp, each, parallel.micro_batches)

    def with_so_many(micro_batches: int) -> RankMemory:
        computations = _computations(parallel.schedule, parallel.pp, each, micro_batches, costs)[pp_rank]
        return largest(config, stages, ranks, pp_rank, _own_transfers(computations, ranks))

    found, more = with_so_many(walked), parallel.micro_batches - walked
    if parallel.schedule != "gpipe" or not more:
        return found
    fewer = with_so_many(walked - 1)
    grown = {name: value + more * (value - getattr(fewer, name)) for name, value in vars(found).items() if name != "pp_rank"}
    return replace(found, **grown)


def enough_micro_batches(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> int:
    """As many micro-batches as need be walked.

    gpipe: until as many sends are under way as may be. interleaved: groups of p, the first ones of p + 1 where p does not divide them;
    after four of each kind a rank does again what it did. The others: twice the pipeline's depth, with two legs four times.
    """
    if schedule == "gpipe":
        return min(micro_batches, ranks * stages_per_rank + 4)
    if schedule == "interleaved":
        groups, left = divmod(micro_batches, ranks)
        longer = min(left, 4)
        return min(micro_batches, (longer + 4) * ranks + longer) if groups > left else micro_batches
    return min(micro_batches, (4 if schedule == "zb_v" else 2) * ranks + 2)


_Costs = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


@lru_cache(maxsize=256)
def _computations(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int, costs: _Costs | None) -> Schedule:
    """costs: of the stages, for a schedule that heeds them."""
    if costs is not None:
        return zb_v(ranks, stages_per_rank, micro_batches, Costs(*costs))
    return SCHEDULES[schedule](ranks, stages_per_rank, micro_batches)


def _own_transfers(computations: Sequence[Action], ranks: Sequence[int]) -> list[Action]:
    """One rank's list with its transfers: a receive starts one computation before the one that needs it."""
    receives = [receive_before(action, ranks) for action in computations]
    actions: list[Action] = []
    for place, action in enumerate(computations):
        if place == 0 and receives[0] is not None:
            actions.append(receives[0])
        following = receives[place + 1] if place + 1 < len(receives) else None
        if following is not None:
            actions.append(following)
        actions += [action, *sends_after(action, ranks)]
    return actions
