"""What a run reads: samples by their global number, whatever they come from."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Rows(Protocol):
    """Samples, each a row of seq_len + 1 tokens: inputs and next-token targets."""

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples until each was given once; None where there is no such end."""
        ...

    def rows(self, first: int, count: int) -> np.ndarray:
        """Global samples first .. first + count - 1, int64 [count, seq_len + 1]. A sample is a function of its number alone."""
        ...
