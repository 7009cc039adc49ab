"""Which steps are taken: decided on the device, from sums that are the same on all ranks, so that nobody waits and all decide alike."""

from __future__ import annotations

import torch
from torch import Tensor

_DECAY = 0.98
"""Of the running mean of the loss: about the last 50 steps count."""
_LEAST_STEPS = 20
"""Steps that the mean must rest on before a loss can be far from it."""


class StepGuard:
    """Finds steps whose loss or gradient is no number, and steps whose loss is far above the mean of those before.

    spike_factor: how many times the mean is a spike, or None. skip_spikes: whether such a step is not taken either.
    """

    def __init__(self, spike_factor: float | None, skip_spikes: bool, device: torch.device) -> None:
        self._factor, self._skips = spike_factor, skip_spikes
        self._mean = torch.zeros(2, dtype=torch.float64, device=device)  # weighted sum of losses, and of their weights
        self._steps = torch.zeros((), dtype=torch.float64, device=device)

    def judge(self, squared_norm: Tensor, loss_sum: Tensor, tokens: Tensor) -> Tensor:
        """fp64 [2], each 0 or 1: the step is not to be taken; its loss is a spike. All arguments are fp64 scalars of the whole job."""
        good = squared_norm.isfinite() & loss_sum.isfinite()
        loss = loss_sum / tokens.clamp(min=1)
        spike = torch.zeros_like(good)
        if self._factor is not None:
            spike = good & (self._steps >= _LEAST_STEPS) & (loss > self._factor * self._mean[0] / self._mean[1])
            counts = good & ~spike if self._skips else good
            updated = _DECAY * self._mean + torch.stack(((1 - _DECAY) * loss, torch.full_like(loss, 1 - _DECAY)))
            self._mean = torch.where(counts, updated, self._mean)
            self._steps = self._steps + counts
        skipped = ~good | spike if self._skips else ~good
        return torch.stack((skipped, spike)).double()

    def state(self) -> list[float]:
        """What a resume needs."""
        return [*self._mean.tolist(), self._steps.item()]

    def load_state(self, state: list[float]) -> None:
        """Go on from what `state` gave."""
        self._mean.copy_(torch.tensor(state[:2], dtype=torch.float64))
        self._steps.fill_(state[2])
