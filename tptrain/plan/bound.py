"""A time that a pipeline's step is certain not to beat, without its schedule: what a search leaves out by it, it can leave out.

A rank's first computation is a forward of its first stage, which waits for a forward of every stage before. Then come all its
computations, one after another. Where a backward is one action (B), the last of them is a backward of that first stage, as those of a
rank's later stages come before it, and the stages before that one follow with a backward each. For each rank:

    step >= forwards of the stages before its first + m * all its stages [+ backwards of the stages before, where B is one action]

And of one stage alone, m forwards and m input gradients stand between the first forward's arrival and the last gradient's departure:

    step >= forwards of the stages before + m * (F + I) + input gradients of the stages before + the first stage's W       (or B for I)

With equal stages and m >= p this is the step of 1f1b, gpipe and interleaved (Narayanan et al. 2021, sections 2.2.1 and 2.2.2), exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from tptrain.pipeline.simulate import Costs


def least_seconds(ranks: Sequence[int], micro_batches: int, costs: Costs, splits: bool) -> float:
    """The bound. ranks: of each stage. costs: of the stages. splits: whether backwards are two actions, as in zb_h1 and zb_v."""
    forward, weights = costs.forward, costs.weight_gradient
    whole = [one + other for one, other in zip(costs.input_gradient, weights, strict=True)]
    gradient = costs.input_gradient if splits else whole
    hops = [costs.transfer * (one != other) for one, other in pairwise(ranks)] + [0.0]
    there = list(accumulate(map(float.__add__, map(float, forward), hops), initial=0.0))
    back = list(accumulate(map(float.__add__, map(float, gradient), hops), initial=weights[0] if splits else 0.0))
    busy: dict[int, float] = {}
    firsts: dict[int, int] = {}
    least = 0.0
    for stage, rank in enumerate(ranks):
        least = max(least, there[stage] + micro_batches * (forward[stage] + gradient[stage]) + back[stage])
        busy[rank] = busy.get(rank, 0.0) + forward[stage] + whole[stage]
        firsts.setdefault(rank, stage)
    return max(least, *(there[stage] + micro_batches * busy[rank] + (0.0 if splits else back[stage]) for rank, stage in firsts.items()))
