"""Random sequences to be learned by heart: the smallest proof that training trains.

The ids are one stream from numpy's Philox generator under a fixed key, so they depend on neither the run's seed nor the
layout nor the numpy version (only the generator's raw 64-bit words are used, which numpy keeps the same for ever).
Windows of seq_len + 1 ids that start every seq_len ids give num_sequences samples with next-token targets; a model
cannot do better than chance on them but by remembering.
"""

from __future__ import annotations

import numpy as np

KEY = 20_240_229
"""Philox's key; another one gives other sequences."""


def random_tokens(count: int, vocab_size: int) -> np.ndarray:
    """`count` ids, uint32 [count], evenly from range(vocab_size) (to within vocab_size / 2**32).

    Takes the high 32 bits of each raw word times vocab_size, over 2**32: a multiplication in place of a remainder.
    """
    words = np.random.Philox(key=KEY).random_raw(count)
    return (((words >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.uint32)
