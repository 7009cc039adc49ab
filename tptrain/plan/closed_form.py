"""A pipeline's time by formula, without its actions: for a search that compares hundreds of layouts.

For m micro-batches on p ranks with equal stages of F, I and W (forward, input gradient, weight gradient; B = I + W):

    gpipe, 1f1b    (m + p - 1) (F + B)                 Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.1
    interleaved    m (F + B) + (p - 1) (F + B) / v     the same, section 2.2.2; v stages a rank
    zb_h1          m (F + B) + (p - 1) (F + I - W)     Qi et al. 2023 (arXiv:2401.10241), table 1
    zb_v           m (F + B) + (p - 1) F / 2           Qi et al. 2024 (arXiv:2405.15362); zb_v of `zero_bubble.py`

Unequal stages: the slowest rank's work counts m times, the other ranks' once, on the way there and back. Transfers of c seconds add 2 c
for each of the p - 1 steps down and up again; in 1f1b also in the middle: rank r has p - r micro-batches under way at most, so each takes
at least 1/(p - r) of their way to the last rank and back. With few micro-batches one's way through all stages and back bounds the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from tptrain.pipeline.simulate import Costs


def stage_ranks(schedule: str, pp: int, stages_per_rank: int) -> list[int]:
    """The rank of each stage of a schedule that has a name: dealt out in turn, in zb_v down and up again."""
    if schedule == "zb_v":
        return [*range(pp), *reversed(range(pp))]
    return [stage % pp for stage in range(pp * stages_per_rank)]


def pipeline_seconds(schedule: str, ranks: Sequence[int], micro_batches: int, costs: Costs) -> float:
    """Seconds from the first computation to the last. ranks: of each stage. costs: of the stages."""
    p, m, c = max(ranks) + 1, micro_batches, costs.transfer
    forward, inputs, weights = costs.forward, costs.input_gradient, costs.weight_gradient
    whole = [sum(parts) for parts in zip(forward, inputs, weights, strict=True)]
    busy = [0.0] * p
    for rank, seconds in zip(ranks, whole, strict=True):
        busy[rank] += seconds
    slowest = max(busy)
    hops = 2 * c * sum(one != other for one, other in zip(ranks[1:], ranks, strict=False))
    if schedule in ("zb_h1", "zb_v"):
        both = [one + other for one, other in zip(forward, inputs, strict=True)]
        way = sum(both) + weights[0] + hops + (m - 1) * max(both)
        if schedule == "zb_v":
            return max(way + weights[-1], m * slowest + sum(forward[: p - 1]) + c * (p - 1))
        return max(way, m * slowest + max(0.0, sum(both[:-1]) - sum(weights[:-1])) + 2 * c * (p - 1))
    if len(ranks) > p:  # interleaved, or gpipe with several stages a rank
        way = sum(whole) + hops + (m - 1) * max(whole)
        filling = sum(whole[: p - 1]) + 2 * c * (p - 1)
        return max(way, m * slowest + filling + 2 * (len(ranks) // p - 1) * p * c * (p > 1))
    if schedule == "gpipe":
        backward = [one + other for one, other in zip(inputs, weights, strict=True)]
        return sum(whole) + 2 * c * (p - 1) + (m - 1) * (max(forward) + max(backward))
    ways = [way + 2 * c * step for step, way in enumerate(accumulate(reversed(whole)))][::-1]  # from each rank to the last and back
    between = max((max(0, m - (p - r)) * way / (p - r) for r, way in enumerate(ways)), default=0.0)
    return sum(whole) + 2 * c * (p - 1) + max((m - 1) * slowest, between)
