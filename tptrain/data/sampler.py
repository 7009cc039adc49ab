"""Which window of tokens is sample number g of the run.

Sample g is a function of (seed, epoch, g) alone: tp, pp, dp, micro-batch size and what was resumed do not enter, so a
checkpoint keeps one number, how many samples were consumed, and any layout goes on from there.

    tokens     0 1 2 3 4 5 6 7 8 9 10 11 12           seq_len 4: samples_per_epoch = (13 - 1) // 4 = 3
    window 0   0 1 2 3 4                              windows share one token: the last target of one
    window 1           4 5 6 7 8                      is the first input of the next, so each
    window 2                   8 9 10 11 12           token but the first is a target once an epoch

The order within an epoch is a permutation that is computed, not stored: a Feistel network (Luby and Rackoff, 1988) over
the next power of four, walked along its cycles until it is back in range (Black and Rogaway, 2002). It takes no memory
and no start-up time at any number of samples.
"""

from __future__ import annotations

import functools
import hashlib
from typing import overload

import numpy as np

from tptrain.data.tokens import Tokens

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


class Sampler:
    """Rows of seq_len + 1 tokens (inputs and next-token targets) by their global number.

    tokens: ids [n]; read window by window, so a memory map stays on disk.
    seed: the run's seed (and, in a mixture, the source), which with the epoch's number gives the order; None for the order of the tokens.
    The last (n - 1) % seq_len tokens fill no window and are not read. Raises ValueError where there is not one window.
    """

    def __init__(self, tokens: np.ndarray | Tokens, seq_len: int, seed: int | str | None) -> None:
        self.samples_per_epoch = (len(tokens) - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise ValueError(f"{len(tokens)} tokens are fewer than one window of seq_len + 1 = {seq_len + 1}")
        self._tokens, self._seq_len, self._seed = tokens, seq_len, seed

    def rows(self, first: int, count: int) -> np.ndarray:
        """Global samples first .. first + count - 1, int64 [count, seq_len + 1].

        Sample g is number g % samples_per_epoch of epoch g // samples_per_epoch, without end. Raises ValueError for
        negative numbers.
        """
        if first < 0 or count < 0:
            raise ValueError(f"samples {first}..{first + count - 1} do not exist")
        rows = np.empty((count, self._seq_len + 1), dtype=np.int64)
        for row, window in enumerate(self.windows(first, count)):
            start = int(window) * self._seq_len
            rows[row] = self._tokens[start : start + self._seq_len + 1]
        return rows

    def windows(self, first: int, count: int) -> np.ndarray:
        """Which window each of those samples is, int64 [count]: window w starts at token w * seq_len."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        epochs, windows = np.divmod(numbers, self.samples_per_epoch)
        if self._seed is None:
            return windows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(windows[here], self.samples_per_epoch, epoch_key(self._seed, int(epoch)))
        return windows


def epoch_key(seed: int | str, epoch: int) -> int:
    """The 64-bit key of one epoch's order: a hash, so that neighbouring seeds and epochs have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "little")


@overload
def permute(index: int, length: int, key: int) -> int: ...
@overload
def permute(index: np.ndarray, length: int, key: int) -> np.ndarray: ...
def permute(index: int | np.ndarray, length: int, key: int) -> int | np.ndarray:
    """Where `index` goes under the permutation of range(length) that the 64-bit `key` picks.

    An int for an int, and int64 of the same shape for an array. Takes on average under four walks, whatever the length
    up to 2**62. Raises ValueError for an index outside range(length).
    """
    if not isinstance(index, np.ndarray):
        return _permute_one(int(index), length, key)
    values = np.array(index, dtype=np.int64).reshape(-1)
    if length < 1 or (values.size and not 0 <= values.min() <= values.max() < length):
        raise ValueError(f"not all of {index} is in range({length})")
    half_bits = ((length - 1).bit_length() + 1) // 2
    round_keys = np.array(_round_keys(key), dtype=np.uint64)
    values = _feistel(values.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(values >= length)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = outside[values[outside] >= length]
    return values.astype(np.int64).reshape(index.shape)


def _permute_one(index: int, length: int, key: int) -> int:
    """The same for one index, in Python's own integers: of one number numpy takes ten times as long."""
    if not 0 <= index < length:
        raise ValueError(f"not all of {index} is in range({length})")
    half_bits = ((length - 1).bit_length() + 1) // 2
    half = (1 << half_bits) - 1
    round_keys = _round_keys(key)
    while True:
        left, right = index >> half_bits, index & half
        for round_key in round_keys:
            mixed = right ^ round_key
            mixed = (mixed ^ mixed >> 30) * _FIRST & _WORD
            mixed = (mixed ^ mixed >> 27) * _SECOND & _WORD
            left, right = right, left ^ (mixed ^ mixed >> 31) & half
        index = left << half_bits | right
        if index < length:
            return index


@functools.lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[int, ...]:
    """What each round mixes in: 64-bit numbers that follow from the key."""
    numbers = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN ^ np.array([key & _WORD], dtype=np.uint64)
    return tuple(_mix(numbers).tolist())


def _feistel(values: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    """A bijection on range(4**half_bits): each round swaps the halves and mixes one into the other. uint64 [n] -> [n]."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every input bit sways every output bit. uint64 [n] -> [n]."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(_FIRST)
    values = (values ^ values >> np.uint64(27)) * np.uint64(_SECOND)
    return values ^ values >> np.uint64(31)
