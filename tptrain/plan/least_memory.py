"""Memory that a rank is certain to need, without its list of actions: what does not fit by it need not be walked.

Counted are the weights with all that belongs to them, and what the smallest of a rank's stages keeps, as often as a schedule surely keeps
something when the rank's first backward begins:

    gpipe         m v
    1f1b, zb_h1   rank r: min(m, p - r)
    interleaved   rank r: min(m v, (v - 1) p + 2 (p - 1 - r) + 1)
    zb_v          rank 0: the forwards that it has time for until the first micro-batch is back from the other ranks, and that one's second
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.pipeline.actions import Action, Kind
from tptrain.plan.memory import margin_share
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


def least_bytes(config: Config, weights: Weights, kept: Sequence[float], extra: Sequence[float] | None = None) -> float:
    """Of the fullest rank of a resolved config. kept: bytes of a micro-batch on each rank's smallest stage. extra: what a backward needs
    besides there."""
    whole = not config.parallel.schedule.startswith("zb_") and config.parallel.micro_batches > 1
    most = 0.0
    for rank, (held, gradients, own) in enumerate(zip(weights.held, weights.gradients, kept, strict=True)):
        live = live_stages(config, weights, rank) * own
        most = max(most, held + max(live + (extra[rank] if extra else 0), live - own + gradients if whole else 0))
    return most * (1 + margin_share(config))


def walked_bytes(config: Config, actions: Sequence[Action], stages: Mapping[int, StageMemory]) -> float:
    """Of one rank, by its list of computations, messages left out. stages: its own, by number. That is near to what it needs; what it
    spares is to work out when each message of the whole pipeline travels."""
    held = sum(stage.parameters + stage.optimizer + stage.copies for stage in stages.values())
    live, most = 0, 0
    weights, gradients = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    completing = {action.stage: action for action in actions if action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)}
    for action in actions:
        kind, number, _ = action
        stage = stages[number]
        if kind is Kind.FORWARD:
            weights[number] = stage.gathered_weights
            live += stage.activations
            now = live + stage.forward_extra
        elif kind is Kind.WEIGHT_GRADIENT:
            gradients[number] = stage.gathered_gradients or stage.gradients
            live -= stage.deferred
            now = live
        else:
            now = live + stage.backward_extra
            live += (stage.deferred if kind is Kind.INPUT_GRADIENT else 0) - stage.activations
        most = max(most, now + sum(weights.values()) + sum(gradients.values()))
        if kind is Kind.BACKWARD:
            gradients[number] = stage.gathered_gradients or stage.gradients
        if completing[number] == action:
            weights[number], gradients[number] = 0, stage.gradients
    return (held + most) * (1 + margin_share(config))


def live_stages(config: Config, weights: Weights, rank: int) -> int:
    """Activations that a rank keeps at once, at least, when its first backward begins; those of one stage and one micro-batch count as
    one."""
    parallel = config.parallel
    p, v, m = parallel.pp, int(parallel.stages_per_rank), parallel.micro_batches
    if parallel.schedule == "gpipe":
        return m * v
    if parallel.schedule == "interleaved":
        return min(m * v, (v - 1) * min(m, p) + 2 * (p - 1 - rank) + 1)
    if parallel.schedule == "zb_v":
        return min(m, 2 * p - 1, 1 + weights.others) + 1 if rank == 0 else 2
    return min(m, p - rank)
