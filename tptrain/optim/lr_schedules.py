"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from tptrain.config import LrScheduleConfig


def learning_rate(step: int, config: LrScheduleConfig, peak: float, max_steps: int) -> float:
    """The learning rate of step `step`, counted from 1.

    Linear warmup from peak/warmup_steps to peak; then constant, or a half cosine that ends at
    min_lr_ratio * peak at max_steps.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.name == "constant":
        return peak
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    low = config.min_lr_ratio
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
