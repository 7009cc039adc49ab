"""The schema of the group `plan`, and the checks of its own values."""

from __future__ import annotations

from dataclasses import dataclass

from tptrain.config_error import refuse


@dataclass
class PlanConfig:
    """What `tptrain plan` works out."""

    trace: bool = False
    """Also run one real step on tensors without values, in a process group without peers, and hold the plan against it."""
    trace_rank: int | None = None
    """The pipeline rank whose step `trace` runs; null means one of each stage, one after another."""
    tokens: float | None = None
    """Tokens of the whole training, for its days and its cost; null means those of train.max_steps."""
    best: int = 10
    """Layouts that a search shows."""
    pictures: bool = True
    """Draw, besides writing plan.json."""


def check_plan(plan: PlanConfig) -> None:
    """Whether the group makes sense by itself. Raises ConfigError."""
    if plan.best < 1:
        raise refuse("plan.best", plan.best, "is below 1", "use 1 or more")
    if plan.tokens is not None and not plan.tokens > 0:
        raise refuse("plan.tokens", plan.tokens, "is not above 0", "use a number of tokens such as 300e9, or null")
    if plan.trace_rank is not None and plan.trace_rank < 0:
        raise refuse("plan.trace_rank", plan.trace_rank, "is below 0", "use a pipeline rank from 0, or null")
