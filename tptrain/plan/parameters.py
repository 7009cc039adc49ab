"""The parameters of a rank, to the element, by formula.

tp and dp split each one as `shards.py` says; sizes that do not divide leave the last ranks fewer rows. What the modules of `model/`
hold is the measure: `tests/plan/test_parameters.py` builds them.
"""

from __future__ import annotations

from tptrain.config import Config
from tptrain.plan.shards import block_shards, ends_shards


def rank_parameters(config: Config, first_layer: int, last_layer: int, tp_rank: int = 0, dp_rank: int = 0) -> int:
    """Elements of the fp32 parameters that a stage with these layers (the last one exclusive) keeps on one rank. Rank 0 of tp and of dp has
    the most."""
    dp, layers = int(config.parallel.dp), last_layer - first_layer
    ends = ends_shards(config, first_layer == 0, last_layer == config.model.num_layers, tp_rank)
    block = sum(shard.elements(dp, dp_rank) for shard in block_shards(config, tp_rank))
    return layers * block + sum(shard.elements(dp, dp_rank) for shard in ends)
