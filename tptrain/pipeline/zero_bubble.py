"""Schedules that split the backward: the input gradient (I) goes out first, the weight gradient (W) fills what would be a bubble.

    zb_h1, p=3, m=4      rank 0  F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
    (Qi et al. 2023)     rank 1     F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
                         rank 2        F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    zb_v, p=2, m=3; stages 0 and 3 on rank 0, 1 and 2 on rank 1; written stage, kind, micro-batch
    (Qi et al. 2024)     rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0I0 3I1 0W0 3W1     3F2 0I1 3I2 0W1 3W2 0I2 0W2
                         rank 1      1F0 2F0 1F1 2F1 2I0 1I0 1W0 2W0 2I1 1F2 2F2 1I1 1W1 2W1 2I2 1I2 1W2 2W2

A stage's activations of a micro-batch live until its weight gradient is done. No I and W stand as one B: the stage before waits
for I alone.
"""

from __future__ import annotations

from tptrain.pipeline.actions import Action, Kind, Schedule
from tptrain.pipeline.simulate import Costs

F, I, W = Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT  # noqa: E741


def zb_h1(ranks: int, stages_per_rank: int, micro_batches: int) -> Schedule:
    """1F1B with weight gradients put off: stage s does a micro-batch's s micro-batches late ("Zero Bubble Pipeline Parallelism",
    Qi et al. 2023, section 2.2, handcrafted schedule ZB-H1).

    Every rank keeps at most p micro-batches' activations, as 1F1B's first does. With F, I and W of one unit each the step takes
    3m + p - 1 units for m >= p, where 1F1B takes 3m + 3(p - 1).
    """
    assert stages_per_rank == 1
    schedule = []
    for stage in range(ranks):
        ahead = min(ranks - 1 - stage, micro_batches)
        actions = [Action(F, stage, m) for m in range(ahead)]
        waiting = 0  # the first micro-batch whose weight gradient is still to do
        for m in range(micro_batches):
            forwards_left = ahead + m < micro_batches
            actions += [Action(F, stage, ahead + m)] * forwards_left + [Action(I, stage, m)]
            if m >= stage or not forwards_left:
                actions.append(Action(W, stage, waiting))
                waiting += 1
        schedule.append(actions + [Action(W, stage, m) for m in range(waiting, micro_batches)])
    return schedule


_TURNS = ((F, 0), (F, 1), (I, 0), (I, 1))
"""The order in which a rank of `zb_v` prefers its work; 0 is its first stage, on the V's way down, 1 its second, on the way up."""


def zb_v(ranks: int, stages_per_rank: int, micro_batches: int, costs: Costs | None = None) -> Schedule:
    """Two stages a rank in a V, s and 2p - 1 - s ("Pipeline Parallelism with Controllable Memory", Qi et al. 2024, ZB-V).

    Made by playing the step: a free rank takes, in turn after what it did last, a forward or an input gradient that is ready, else a
    weight gradient. It keeps at most 2p activations of a stage, p micro-batches' worth, and leaves the last of them to its second
    stage, whose backward comes first: so a micro-batch that is under way can always finish.
    costs: of the stages, in whole numbers; None: F, I and W of one unit each. Then the step takes 6m + p - 1 units for m >= p (at most
    5 more with p from 12 to 16). These units are half of zb_h1's, and so is the bubble.
    """
    assert stages_per_rank == 2
    units = [1] * 2 * ranks
    costs = costs or Costs(units, units, units)
    stages = 2 * ranks
    legs = [(rank, stages - 1 - rank) for rank in range(ranks)]
    schedule: Schedule = [[] for _ in range(ranks)]
    ends: dict[Kind, list[list[float]]] = {kind: [[] for _ in range(stages)] for kind in (F, I, W)}  # of each stage's micro-batches so far
    live, last_turn, free_at = [0] * ranks, [-1] * ranks, [0.0] * ranks
    now = 0.0

    def ready(kind: Kind, rank: int, leg: int) -> bool:
        """Whether the rank can do what comes next of a kind on one of its stages."""
        stage = legs[rank][leg]
        m = len(ends[kind][stage])
        if m == micro_batches or (kind is F and live[rank] >= stages - 1 + leg):
            return False
        if kind is not F:
            own = ends[F if kind is I else I][stage]
            if m >= len(own) or own[m] > now:
                return False
        before = stage - 1 if kind is F else stage + 1 if kind is I else -1
        if not 0 <= before < stages:
            return True
        made = ends[kind][before]
        return m < len(made) and made[m] <= now

    def choose(rank: int) -> tuple[Kind, int] | None:
        for turn in range(last_turn[rank] + 1, last_turn[rank] + 1 + len(_TURNS)):
            kind, leg = _TURNS[turn % len(_TURNS)]
            if ready(kind, rank, leg):
                last_turn[rank] = turn % len(_TURNS)
                return kind, leg
        return next(((W, leg) for leg in (0, 1) if ready(W, rank, leg)), None)

    while any(len(actions) < 6 * micro_batches for actions in schedule):
        for rank in range(ranks):
            chosen = choose(rank) if free_at[rank] <= now else None
            if chosen is not None:
                kind, leg = chosen
                stage = legs[rank][leg]
                action = Action(kind, stage, len(ends[kind][stage]))
                schedule[rank].append(action)
                live[rank] += (kind is F) - (kind is W)
                free_at[rank] = now + costs.of(action)
                ends[kind][stage].append(free_at[rank])
        later = [time for time in free_at if time > now]
        assert later, "no rank can go on"
        now = min(later)
    return schedule
