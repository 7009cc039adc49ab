"""Several sources as one, each with its share of the samples.

The order of the sources is periodic and fixed: in a period of 100,000 slots each source has its share of them, rounded,
spread evenly. Slot g % period says which source sample g comes from, and how many of that source's samples lie before it.

    shares 0.5, 0.3, 0.2      a b c a a b a c b a | a b c a ...
    number in its source      0 0 0 1 2 1 3 1 2 4 | 5 3 2 6 ...

Over any run of slots, wherever it starts, each source's count is off its share by less than two samples: the k-th of a
source's n slots lies between k and k + 1 times period / n, where scheduling the earliest deadline first places all (as
in the fair sharing of a processor: Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", 1996).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tptrain.data.rows import Rows

PERIOD = 100_000
"""Slots until the order of the sources repeats: shares are kept to within 1 in 200,000."""


class Mixture:
    """Rows of several Rows, by name. The order in which they are named means nothing.

    weights: one a name, above 0, relative to each other. temperature: shares follow weight ** (1 / temperature).
    Raises ValueError where a source's share is less than one slot of a period.
    """

    samples_per_epoch: int | None = None
    """Each source has epochs of its own: `taken` tells where they stand."""

    def __init__(self, parts: Mapping[str, Rows], weights: Mapping[str, float], temperature: float = 1.0) -> None:
        names = sorted(parts)
        self.parts = {name: parts[name] for name in names}
        self.shares = shares_of({name: weights[name] for name in names}, temperature)
        self._counts = slots_of(list(self.shares.values()))
        if 0 in self._counts:
            name = names[self._counts.index(0)]
            raise ValueError(f"{name} has a share of {self.shares[name]:.1e}, less than one sample in {PERIOD:,}")
        self._source = spread(self._counts)
        """Which source each slot of a period is of, int16 [PERIOD]."""

    def rows(self, first: int, count: int) -> np.ndarray:
        """Global samples first .. first + count - 1, int64 [count, seq_len + 1]. Raises ValueError for negative numbers."""
        if first < 0 or count < 0:
            raise ValueError(f"samples {first}..{first + count - 1} do not exist")
        source = self._source[np.arange(first, first + count) % PERIOD]
        taken = self.taken(first)
        pieces: dict[int, np.ndarray] = {}
        for number, (name, part) in enumerate(self.parts.items()):
            wanted = int(np.count_nonzero(source == number))
            if wanted or not pieces:  # one piece at least, for the width of an empty answer
                pieces[number] = part.rows(taken[name], wanted)  # in a row: nobody else reads of this source in between
        rows = np.empty((count, next(iter(pieces.values())).shape[1]), dtype=np.int64)
        for number, piece in pieces.items():
            rows[source == number] = piece
        return rows

    def taken(self, samples: int) -> dict[str, int]:
        """How many of each source's samples are among the first `samples` of the mixture."""
        periods, slots = divmod(samples, PERIOD)
        begun = np.bincount(self._source[:slots], minlength=len(self._counts)).tolist()
        return {name: periods * whole + part for name, whole, part in zip(self.parts, self._counts, begun, strict=True)}


def shares_of(weights: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """The share of each, in proportion to weight ** (1 / temperature); they sum to 1.

    >>> shares_of({"a": 4.0, "b": 1.0}, temperature=2.0)["a"]
    0.6666666666666666
    """
    powers = {name: math.log(weight) / temperature for name, weight in weights.items()}
    largest = max(powers.values())
    raised = {name: math.exp(power - largest) for name, power in powers.items()}
    total = sum(raised.values())
    return {name: power / total for name, power in raised.items()}


def slots_of(shares: Sequence[float]) -> list[int]:
    """Slots of a period for each share, by largest remainder: they sum to PERIOD.

    >>> slots_of([0.7, 0.3])
    [70000, 30000]
    """
    exact = [share * PERIOD for share in shares]
    slots = [math.floor(round(number, 6)) for number in exact]  # 0.7 * 100,000 is a hair below 70,000
    largest_first = sorted(range(len(exact)), key=lambda place: slots[place] - exact[place])
    for place in largest_first[: PERIOD - sum(slots)]:
        slots[place] += 1
    return slots


def spread(counts: Sequence[int]) -> np.ndarray:
    """Which source each slot is of, int16 [sum of counts]: as evenly spread as the counts of all allow."""
    period = sum(counts)
    waiting: list[tuple[int, int, int]] = sorted(
        (k * period // count, -(-(k + 1) * period // count), number) for number, count in enumerate(counts) for k in range(count)
    )
    order = np.empty(period, dtype=np.int16)
    ready: list[tuple[int, int]] = []
    place = 0
    for slot in range(period):
        while place < period and waiting[place][0] <= slot:
            heapq.heappush(ready, waiting[place][1:])
            place += 1
        order[slot] = heapq.heappop(ready)[1]
    return order
