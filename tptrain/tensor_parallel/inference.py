"""The split layers forward-only: no graph, and results in buffers that the next call overwrites.

Training's layers (`layers.py`) make a new tensor for each result, as backward wants to see it again. Here a result's place in the
model (`"attention.q"`) names its buffer, which all blocks share and every token reuses. The arithmetic and the weights are the
layers' own:

    columns     no communication
    row         one all-reduce, in place
    embedding   one all-reduce, in place

Keys and values of earlier tokens stay in a `KeyValueCache`, of which each rank holds those of its own heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.tensor_parallel.communication import split, start_all_gather
from tptrain.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, head_of
from tptrain.tensor_parallel.linear import Operand


class ForwardOnly:
    """Runs split layers on matrices [n, h], one row a token. Call it under `torch.no_grad`.

    `place` names the buffer of a result, which is valid until the next call with the same name. A buffer is as large as the largest
    result so far. Layers with sequence_parallel are refused: its split of the sequence is made for training.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def columns(self, place: str, x: Tensor, layers: Sequence[ColumnParallelLinear]) -> list[Tensor]:
        """Several column layers of one input. x: [n, in], equal on all ranks -> [n, out/tp] each, [n, out] with gather_output.

        Forward: no communication; all-gather with gather_output. Backward: none.
        """
        outputs = []
        for number, layer in enumerate(layers):
            _refuse_sequence_parallel(layer)
            y = self._product(f"{place}.{number}", x, layer.operand())
            outputs.append(start_all_gather(y, -1, layer.out_features, layer.group).wait() if layer.gather_output else y)
        return outputs

    def row(self, place: str, x: Tensor, layer: RowParallelLinear) -> Tensor:
        """x: [n, in/tp], or [n, in] without input_is_parallel -> [n, out], equal on all ranks.

        Forward: all-reduce of the partial products, in place; then the bias, once. Backward: none.
        """
        _refuse_sequence_parallel(layer)
        if not layer.input_is_parallel:
            x = split(x, -1, layer.group)
        y = self._product(place, x, Operand(layer.weight, layer.values("weight"), None, None))
        _all_reduce(y, layer.group)
        return y if layer.bias is None else y.add_(layer.values("bias"))

    def embedding(self, place: str, tokens: Tensor, layer: VocabParallelEmbedding) -> Tensor:
        """tokens: [n] int64 -> [n, h], equal on all ranks.

        Forward: each rank looks up the tokens it owns, zeros elsewhere; then all-reduce, in place. Backward: none.
        """
        _refuse_sequence_parallel(layer)
        values = layer.values("weight")
        rows = self._buffer(place, (tokens.shape[0], values.shape[1]), values)
        if layer.group.size() == 1:
            return torch.index_select(values, 0, tokens, out=rows)
        if values.shape[0]:
            here = (tokens - layer.start).clamp_(0, values.shape[0] - 1)
            torch.index_select(values, 0, here, out=rows)
            rows.masked_fill_(((tokens < layer.start) | (tokens >= layer.stop)).unsqueeze(-1), 0)
        else:  # more ranks than rows of the table: this one owns none
            rows.zero_()
        _all_reduce(rows, layer.group)
        return rows

    def logits(self, place: str, x: Tensor, layer: ColumnParallelLinear | VocabParallelEmbedding) -> Tensor:
        """The head, or an embedding used as one. x: [n, h] -> this rank's logits [n, vocab/tp]. No communication."""
        return self._product(place, x, head_of(layer))

    def _product(self, place: str, x: Tensor, operand: Operand) -> Tensor:
        """x W^T + b in the place's buffer."""
        weight = operand.weight_values
        y = self._buffer(place, (x.shape[0], weight.shape[0]), x)
        if operand.bias_values is None:
            return torch.mm(x, weight.t(), out=y)
        return torch.addmm(operand.bias_values, x, weight.t(), out=y)

    def _buffer(self, place: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor in the place's memory, with the dtype and the device of `like`."""
        size = math.prod(shape)
        kept = self._buffers.get(place)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._buffers[place] = like.new_empty(size)
        return kept[:size].view(shape)


class KeyValueCache:
    """Keys and values of all tokens so far, of this rank's heads: layers x 2 x [b, kv_heads/tp, max_tokens, d], allocated once.

    Where tp divides kv_heads, a rank holds 1/tp of the whole; with more ranks than heads each holds the one head that its query
    heads read (`SharedColumnLinear`).
    """

    def __init__(
        self,
        layers: int,
        batch_size: int,
        kv_heads: int,
        max_tokens: int,
        head_size: int,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """kv_heads: of the whole model. Raises ValueError where they cannot be split over the group."""
        tp = group.size()
        if kv_heads % tp and tp % kv_heads:
            raise ValueError(f"{kv_heads} key/value heads are neither divided by tp={tp} nor divide it")
        here = max(1, kv_heads // tp)
        self.max_tokens = max_tokens
        self.values = torch.zeros(layers, 2, batch_size, here, max_tokens, head_size, dtype=dtype, device=device)
        self.length = 0
        """Tokens that every layer has."""

    @property
    def bytes(self) -> int:
        """Memory of this rank's part."""
        return self.values.numel() * self.values.element_size()

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put t new tokens' k and v, [b, kv_heads/tp, t, d], behind those of a layer; all of its k and v, as views.

        They count once `advance` is called, after the last layer.
        """
        stop = self.length + k.shape[2]
        if stop > self.max_tokens:
            raise ValueError(f"{stop} tokens are more than the {self.max_tokens} that the cache was made for")
        both = self.values[layer, :, :, :, :stop]
        both[0, :, :, self.length :] = k
        both[1, :, :, self.length :] = v
        return both[0], both[1]

    def advance(self, tokens: int) -> None:
        """Count the tokens that all layers have been extended by."""
        self.length += tokens


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> None:
    """Sum over the group, in place."""
    if group.size() > 1:
        dist.all_reduce(x, group=group)


def _refuse_sequence_parallel(layer: ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding) -> None:
    if layer.sequence_parallel:
        raise ValueError("a layer with sequence_parallel holds a part of the sequence, and inference needs all of it: build it without")
