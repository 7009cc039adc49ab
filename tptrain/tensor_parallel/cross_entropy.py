"""Cross entropy of logits that are split over the vocabulary; the whole logits exist on no rank.

With z the logits less their maximum and t the target, the loss of a token is log(sum_v exp(z_v)) - z_t. Each rank holds z
for its own rows of the vocabulary, so two small collectives suffice: the maximum, and the sum of the pair
(sum of exp, z_t), where z_t comes from the one rank that owns t. The gradient, softmax(z) - onehot(t), is local.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100
"""A target that counts for nothing: no loss, no gradient."""


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocab_start: int, group: dist.ProcessGroup) -> Tensor:
    """The loss of each token in nats, fp32, equal on all ranks; 0 where the target is IGNORE_INDEX.

    logits: [n, vocab/tp], this rank's part, whose first column is row `vocab_start` of the vocabulary.
    targets: [n] int64, ids in the whole vocabulary. Returns [n].
    Forward: one all-reduce (max) and one all-reduce (sum) of n and 2n numbers. Backward: no communication.
    """
    return _CrossEntropy.apply(logits, targets, vocab_start, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_start: int, group: dist.ProcessGroup) -> Tensor:
        width = logits.shape[1]
        maximum = torch.full(targets.shape, -torch.inf, device=logits.device)  # stays so on a rank that owns no rows
        if width:
            maximum = logits.amax(dim=1).float()
        if group.size() > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        shifted = logits.float().sub(maximum.unsqueeze(1))  # a new tensor: the caller's logits stay as they are

        columns = targets - vocab_start
        owned = (columns >= 0) & (columns < width) & (targets != IGNORE_INDEX)
        columns = columns.masked_fill(~owned, 0)
        target_logits = torch.zeros_like(maximum)
        if width:
            target_logits = shifted.gather(1, columns.unsqueeze(1)).squeeze(1).masked_fill(~owned, 0)
        exponents = shifted.exp_()
        sums = torch.stack((exponents.sum(dim=1), target_logits))
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        denominator, target_logit = sums.unbind()
        counted = targets != IGNORE_INDEX
        ctx.save_for_backward(exponents.div_(denominator.unsqueeze(1)), columns, owned, counted)
        ctx.dtype = logits.dtype
        return (denominator.log() - target_logit).masked_fill(~counted, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, columns, owned, counted = ctx.saved_tensors
        scale = (grad * counted).unsqueeze(1)
        result = probabilities * scale
        if result.shape[1]:
            result.scatter_add_(1, columns.unsqueeze(1), -scale * owned.unsqueeze(1))
        return result.to(ctx.dtype), None, None, None
