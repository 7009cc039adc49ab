from __future__ import annotations

import numpy as np

from tptrain.pipeline.partition import even_partition


def test_layers_are_cut_as_numpy_cuts_an_array() -> None:
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            runs = np.array_split(np.arange(layers), stages)  # contiguous, sizes that differ by at most one, longer ones first
            assert even_partition(layers, stages) == [(run[0], run[-1] + 1) for run in runs]
