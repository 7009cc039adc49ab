"""Cross entropy of logits that are split over the vocabulary; the whole logits exist on no rank.

With z the logits and t the target, the loss of a token is log(sum_v exp(z_v)) - z_t; smoothed by e over V tokens it is
log(sum_v exp(z_v)) - (1 - e) z_t - e/V sum_v z_v. Each rank sums its own part of the vocabulary, relative to its own maximum,
and two small collectives join the sums: the maximum of the maxima, and one sum of (sum of exp, z_t, sum of z), where z_t comes
from the one rank that owns t. The gradient, softmax(z) - (1 - e) onehot(t) - e/V, needs no communication.

`chunked_cross_entropy` makes the logits from the head's input itself, a few tokens at a time, keeps none of them, and makes them
once more in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tptrain.tensor_parallel.communication import all_reduce, start_all_reduce
from tptrain.tensor_parallel.linear import Operand
from tptrain.tensor_parallel.parameter import add_product

IGNORE_INDEX = -100
"""A target that counts for nothing: no loss, no gradient."""


@dataclass(frozen=True)
class Vocabulary:
    """Which part of the vocabulary a rank's logits are for."""

    start: int
    """The token of the first column."""
    size: int
    """Tokens of the whole vocabulary. Columns beyond it are padding: they join neither the sums nor the gradient."""
    group: dist.ProcessGroup


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocabulary: Vocabulary, label_smoothing: float = 0.0, overwrite: bool = False
) -> Tensor:
    """The loss of each token in nats, fp32, equal on all ranks; 0 where the target is IGNORE_INDEX.

    logits: [n, vocab/tp], this rank's part. targets: [n] int64, ids in the whole vocabulary. Returns [n].
    overwrite: the caller gives the logits away, and fp32 ones make room for what backward needs.
    Forward: one all-reduce (max) and one all-reduce (sum) of n and 2n numbers (3n with smoothing). Backward: no communication.
    """
    return _CrossEntropy.apply(logits, targets, vocabulary, label_smoothing, overwrite)


def chunked_cross_entropy(
    x: Tensor, head: Operand, targets: Tensor, vocabulary: Vocabulary, label_smoothing: float, chunk_tokens: int
) -> Tensor:
    """The same from the head's input: at most chunk_tokens rows of the local logits exist at a time.

    x: [n, h], equal on all ranks; its gradient here is this rank's part, so `x` comes from `copy_to_group` or
    `gather_from_sequence`. Forward: two all-reduces in all, however many chunks. Backward: no communication.
    """
    return _ChunkedCrossEntropy.apply(x, head, targets, vocabulary, label_smoothing, chunk_tokens, head.weight)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocabulary: Vocabulary, smoothing: float, overwrite: bool) -> Tensor:
        part = _Part.of(targets, vocabulary, logits.shape[1])
        sums, exponentials = _sum_up(logits.detach(), part, smoothing, overwrite)
        loss, maximum, denominator = _join(sums, part, vocabulary, smoothing)
        ctx.part, ctx.vocabulary, ctx.smoothing, ctx.dtype, ctx.columns = part, vocabulary, smoothing, logits.dtype, logits.shape[1]
        ctx.save_for_backward(exponentials, (sums[0] - maximum).exp_() / denominator)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        exponentials, to_probability = ctx.saved_tensors
        result = _gradient(exponentials, to_probability, grad, ctx.part, ctx.vocabulary, ctx.smoothing)
        return _padded(result, ctx.columns).to(ctx.dtype), None, None, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Operand, targets: Tensor, vocabulary: Vocabulary, smoothing: float, chunk: int, _: Tensor
    ) -> Tensor:
        part = _Part.of(targets, vocabulary, head.weight_values.shape[0])
        weight = head.weight_values.t()
        chunks = [_sum_up(x[rows] @ weight, part.rows(rows), smoothing, overwrite=True)[0] for rows in _slices(len(x), chunk)]
        sums = [torch.cat(values) for values in zip(*chunks, strict=True)]
        loss, maximum, denominator = _join(sums, part, vocabulary, smoothing)
        ctx.part, ctx.vocabulary, ctx.smoothing, ctx.head, ctx.chunk = part, vocabulary, smoothing, head, chunk
        ctx.save_for_backward(x, maximum, denominator)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, maximum, denominator = ctx.saved_tensors
        weight = ctx.head.weight_values
        x_grad = torch.empty_like(x)
        for rows in _slices(len(x), ctx.chunk):
            part = ctx.part.rows(rows)
            logits = (x[rows] @ weight.t())[:, : part.width]
            exponents = torch.sub(logits, maximum[rows].unsqueeze(1)).exp_()
            y_grad = _gradient(exponents, 1 / denominator[rows], grad[rows], part, ctx.vocabulary, ctx.smoothing)
            y_grad = _padded(y_grad, len(weight)).to(x.dtype)
            x_grad[rows] = y_grad @ weight
            add_product(ctx.head.weight, y_grad, x[rows], ctx.head.rows)
        return x_grad, None, None, None, None, None, None


# ---- the arithmetic of one rank's part ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Where the targets are, seen from this rank's part of the vocabulary: tensors [n]."""

    width: int
    """Columns of the part, padding not counted."""
    column: Tensor
    """The target's; 0 where the part does not own it."""
    owned: Tensor
    counted: Tensor

    @staticmethod
    def of(targets: Tensor, vocabulary: Vocabulary, columns: int) -> _Part:
        """For a part of so many columns, padding included."""
        width = max(0, min(columns, vocabulary.size - vocabulary.start))
        column, counted = targets - vocabulary.start, targets != IGNORE_INDEX
        owned = (column >= 0) & (column < width) & counted
        return _Part(width, column.masked_fill(~owned, 0), owned, counted)

    def rows(self, rows: slice) -> _Part:
        """The same for some of the tokens."""
        return _Part(self.width, self.column[rows], self.owned[rows], self.counted[rows])


def _sum_up(logits: Tensor, part: _Part, smoothing: float, overwrite: bool) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What this rank knows of each token, fp32 [n] each: its maximum m, and its sums of exp(z - m), of z_t - m and, for smoothing, z - m.

    With it exp(z - m), fp32 [n, width], in the logits' own memory if they are fp32 and may be overwritten: a tensor of that size costs
    a CPU more to get than to fill.
    """
    logits = logits[:, : part.width]
    if not part.width:  # m is small enough that the part counts for nothing, and finite, as 0 * inf would be no number
        zeros = logits.new_zeros(len(logits), dtype=torch.float32)
        return (torch.full_like(zeros, torch.finfo(torch.float32).min), zeros, zeros, zeros), logits.float()
    values = logits.float()  # a copy, unless they are fp32
    maximum = values.amax(dim=1)
    mine = overwrite or values.dtype != logits.dtype
    values = values.sub_(maximum.unsqueeze(1)) if mine else values - maximum.unsqueeze(1)
    target = values.gather(1, part.column.unsqueeze(1)).squeeze(1).masked_fill(~part.owned, 0)
    total = values.sum(dim=1) if smoothing else torch.zeros_like(maximum)
    exponentials = values.exp_()
    return (maximum, exponentials.sum(dim=1), target, total), exponentials


def _join(sums: Sequence[Tensor], part: _Part, vocabulary: Vocabulary, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks' sums joined: each token's loss, the maximum over the vocabulary, and the sum of exp(z - maximum); [n] each."""
    own_maximum, exp_sum, target, total = sums
    together = vocabulary.group.size() > 1
    maximum = all_reduce(own_maximum, vocabulary.group, dist.ReduceOp.MAX) if together else own_maximum
    rise = own_maximum - maximum
    joined = [exp_sum * rise.exp(), target + rise.masked_fill(~part.owned, 0)]
    if smoothing:
        joined.append(total + part.width * rise)
    stacked = torch.stack(joined)
    if together:
        stacked = start_all_reduce(stacked, vocabulary.group).wait()
    loss = stacked[0].log() - (1 - smoothing) * stacked[1]
    if smoothing:
        loss -= smoothing / vocabulary.size * stacked[2]
    return loss.masked_fill_(~part.counted, 0), maximum, stacked[0]


def _gradient(values: Tensor, to_probability: Tensor, grad: Tensor, part: _Part, vocabulary: Vocabulary, smoothing: float) -> Tensor:
    """The logits' gradient [n, width], written over `values`, which times to_probability [n] are the probabilities."""
    scale = grad * part.counted
    result = values.mul_((to_probability * scale).unsqueeze(1))
    if part.width:
        result.scatter_add_(1, part.column.unsqueeze(1), ((smoothing - 1) * scale * part.owned).unsqueeze(1))
    if smoothing:
        result.sub_((smoothing / vocabulary.size * scale).unsqueeze(1))
    return result


def _padded(gradient: Tensor, columns: int) -> Tensor:
    """With zeros for the padding's columns, where there are any."""
    return gradient if gradient.shape[1] == columns else F.pad(gradient, (0, columns - gradient.shape[1]))


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
