"""The parameters of a stage as one rank of its tp group holds them, and what dp makes of each: by formula, without building anything.

It says of each parameter what `model/`, `tensor_parallel/layers.py` and `data_parallel.dp_dimension` decide: which dimension tp splits,
which dp, and whether the gradient that a tp rank makes is a part that is still to be summed over tp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from tptrain.config import Config


@dataclass(frozen=True)
class Shard:
    """One parameter on one tp rank."""

    shape: tuple[int, ...]
    """Of this tp rank's part."""
    dp_dim: int
    """The dimension that dp splits, where there is dp."""
    partial: bool
    """Whether its gradient is summed over tp, because each tp rank makes a part of it."""

    def padded_elements(self, dp: int) -> int:
        """Elements that dp ranks gather and reduce-scatter: each one's part is as large as the first one's."""
        return -(-self.shape[self.dp_dim] // dp) * dp * math.prod(self.shape) // max(1, self.shape[self.dp_dim])

    def elements(self, dp: int, dp_rank: int) -> int:
        """Elements that one dp rank keeps."""
        return split_size(self.shape[self.dp_dim], dp, dp_rank) * math.prod(self.shape) // max(1, self.shape[self.dp_dim])


def split_size(size: int, parts: int, index: int) -> int:
    """Size of part `index` where the first ones are ceil(size / parts), as `torch.chunk` splits.

    >>> [split_size(257, 4, index) for index in range(4)]
    [65, 65, 65, 62]
    """
    step = -(-size // parts)
    return min((index + 1) * step, size) - min(index * step, size)


def block_shards(config: Config, tp_rank: int = 0) -> tuple[Shard, ...]:
    """The parameters of one transformer block."""
    return _block(*_facts(config, tp_rank))


def ends_shards(config: Config, is_first: bool, is_last: bool, tp_rank: int = 0) -> tuple[Shard, ...]:
    """What a stage holds besides its blocks: embedding and positions on the first, final norm and head on the last.

    With tied embeddings the last of several stages holds its own copy of the table.
    """
    return _ends(*_facts(config, tp_rank), is_first, is_last)


@dataclass(frozen=True)
class _Model:
    """The model as a key."""

    hidden: int
    ffn: int
    kv_size: int
    kv_split: bool
    vocab: int
    positions: int
    norm_bias: bool
    bias: bool
    gated: bool
    tied: bool


@dataclass(frozen=True)
class _Split:
    tp: int
    tp_rank: int
    dp: int
    sequence: bool


def _facts(config: Config, tp_rank: int) -> tuple[_Model, _Split]:
    model, parallel = config.model, config.parallel
    facts = _Model(
        hidden=model.hidden_size, ffn=model.ffn_hidden_size, kv_size=model.kv_heads * model.head_size,
        kv_split=model.kv_heads % parallel.tp == 0, vocab=model.vocab_size,
        positions=model.max_seq_len if model.position == "learned" else 0, norm_bias=model.bias and model.norm == "layernorm",
        bias=model.bias, gated=model.activation == "swiglu", tied=model.tie_embeddings,
    )  # fmt: skip
    return facts, _Split(parallel.tp, tp_rank, int(parallel.dp), parallel.sequence_parallel)


@lru_cache(maxsize=4096)
def _block(model: _Model, split: _Split) -> tuple[Shard, ...]:
    hidden = model.hidden
    shards = 2 * _norm(model, split)
    shards += _column(hidden, hidden, model.bias, split)
    if model.kv_split:
        shards += 2 * _column(model.kv_size, hidden, model.bias, split)
    else:
        shards += 2 * [_shard((model.kv_size, hidden), None, split, partial=True)]
        shards += 2 * [_shard((model.kv_size,), None, split, partial=True)] * model.bias
    shards += _row(hidden, hidden, model.bias, split)
    shards += (1 + model.gated) * _column(model.ffn, hidden, model.bias, split)
    shards += _row(hidden, model.ffn, model.bias, split)
    return tuple(shards)


@lru_cache(maxsize=4096)
def _ends(model: _Model, split: _Split, is_first: bool, is_last: bool) -> tuple[Shard, ...]:
    table = [_shard((model.vocab, model.hidden), 0, split)]
    shards: list[Shard] = []
    if is_first or (is_last and model.tied):
        shards += table
    if is_first and model.positions:
        shards.append(_shard((model.positions, model.hidden), None, split, split.sequence))
    if is_last:
        shards += _norm(model, split) + table * (not model.tied)
    return tuple(shards)


def _norm(model: _Model, split: _Split) -> list[Shard]:
    return [_shard((model.hidden,), None, split, split.sequence)] * (1 + model.norm_bias)


def _column(outputs: int, inputs: int, bias: bool, split: _Split) -> list[Shard]:
    return [_shard((outputs, inputs), 0, split)] + [_shard((outputs,), 0, split)] * bias


def _row(outputs: int, inputs: int, bias: bool, split: _Split) -> list[Shard]:
    return [_shard((outputs, inputs), 1, split)] + [_shard((outputs,), None, split, split.sequence)] * bias


def _shard(shape: tuple[int, ...], tp_dim: int | None, split: _Split, partial: bool = False) -> Shard:
    """A parameter of the whole shape `shape`, split over tp along `tp_dim` (None: replicated)."""
    free = [dim for dim in range(len(shape)) if dim != tp_dim]
    dp_dim = next((dim for dim in free if shape[dim] % split.dp == 0), 0)
    local = tuple(split_size(size, split.tp, split.tp_rank) if dim == tp_dim else size for dim, size in enumerate(shape))
    return Shard(local, dp_dim, partial)
