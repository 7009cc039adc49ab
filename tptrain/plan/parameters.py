"""The parameters of a rank, to the element, by formula.

tp splits a parameter as `torch.chunk` does: rank i of n has rows [ceil(size/n) * i, ceil(size/n) * (i + 1)), cut off at the end. dp cuts what a tp
rank has in the same way, along a dimension that tp leaves alone and dp divides, else along the first. The
expectation is what the modules of `model/` hold; `tests/plan/test_parameters.py` builds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from tptrain.config import Config, ModelConfig


class Weight(NamedTuple):
    """A parameter of the model."""

    shape: tuple[int, ...]
    """Of the whole."""
    split: int | None = None
    """The dimension that tp splits; None: every tp rank has all of it."""

    def part(self, tp: int, tp_rank: int = 0) -> tuple[int, ...]:
        """The shape of what a tp rank has of it. Rank 0 has the most."""
        return tuple(chunk(size, tp, tp_rank) if dim == self.split else size for dim, size in enumerate(self.shape))

    def shard(self, tp: int, dp: int, tp_rank: int = 0, dp_rank: int = 0) -> int:
        """Elements that one rank keeps of it."""
        part, cut = self.part(tp, tp_rank), self.dp_dimension(dp)
        return math.prod(chunk(size, dp, dp_rank) if dim == cut else size for dim, size in enumerate(part))

    def dp_dimension(self, dp: int) -> int:
        """The dimension that dp splits, as `data_parallel.dp_dimension` chooses it."""
        return next((dim for dim, size in enumerate(self.shape) if dim != self.split and size % dp == 0), 0)


def rank_parameters(config: Config, first_layer: int, last_layer: int, tp_rank: int = 0, dp_rank: int = 0) -> int:
    """Elements of the fp32 parameters that a stage with these layers (the last one exclusive) keeps on one rank."""
    model, tp, dp = config.model, config.parallel.tp, int(config.parallel.dp)

    def kept(weights: Iterable[Weight]) -> int:
        return sum(weight.shard(tp, dp, tp_rank, dp_rank) for weight in weights)

    blocks = (last_layer - first_layer) * kept(block_weights(model, tp))
    return blocks + kept(outer_weights(model, first_layer, last_layer))


def block_weights(model: ModelConfig, tp: int) -> list[Weight]:
    """The parameters of one block. Key/value heads fewer than tp are whole on every rank."""
    h, ffn, kv = model.hidden_size, model.ffn_hidden_size, model.kv_heads * model.head_size
    kv_split = 0 if model.kv_heads % tp == 0 else None
    columns = [Weight((h, h), 0), Weight((kv, h), kv_split), Weight((kv, h), kv_split)]
    columns += [Weight((ffn, h), 0)] * (2 if model.activation == "swiglu" else 1)
    rows = [Weight((h, h), 1), Weight((h, ffn), 1)]
    biases = [Weight((weight.shape[0],), weight.split) for weight in columns] + [Weight((h,)), Weight((h,))]
    return columns + rows + biases * model.bias + 2 * norm_weights(model)


def norm_weights(model: ModelConfig) -> list[Weight]:
    """The parameters of one norm."""
    return [Weight((model.hidden_size,))] * (1 + (model.norm == "layernorm" and model.bias))


def outer_weights(model: ModelConfig, first_layer: int, last_layer: int) -> list[Weight]:
    """What a stage has besides its blocks: embedding and positions on the first, the final norm and the head on the last, which of several
    stages has a copy of a tied embedding."""
    is_first, is_last = first_layer == 0, last_layer == model.num_layers
    table = Weight((model.vocab_size, model.hidden_size), 0)
    weights = [table] * (max(is_first, is_last) if model.tie_embeddings else is_first + is_last)
    weights += [Weight((model.max_seq_len, model.hidden_size))] * (is_first and model.position == "learned")
    return weights + norm_weights(model) * is_last


def chunk(size: int, parts: int, index: int) -> int:
    """Elements of part `index` of `parts` of a dimension.

    >>> [chunk(257, 4, index) for index in range(4)]
    [65, 65, 65, 62]
    """
    step = -(-size // parts)
    return max(0, min(step, size - index * step))
