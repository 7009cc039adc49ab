"""What one micro-batch keeps and needs around a stage's blocks, on one tp rank, in bytes: embedding, what all blocks share, loss."""

from __future__ import annotations

from dataclasses import dataclass

from tptrain.config import Config
from tptrain.plan.activations import FP32, INT64, Sizes, norm_kept


@dataclass(frozen=True)
class HeadMemory:
    """The final norm, the head and the loss."""

    kept: int
    """From the forward to the backward."""
    deferred: int
    """From the input gradient to the weight gradient; in chunks the weight gradient is made at once."""
    forward_extra: int
    """At the forward's peak, beyond what is kept."""
    loss_extra: int
    """At the peak of the loss's backward, beyond what is kept: before there is a weight gradient."""
    linear_extra: int
    """At the peak of the head's backward, beyond what is kept, the weight's sum of gradients not counted."""

    @property
    def backward_extra(self) -> int:
        """The larger of both."""
        return max(self.loss_extra, self.linear_extra)


NO_HEAD = HeadMemory(0, 0, 0, 0, 0)


def head_memory(config: Config, sizes: Sizes) -> HeadMemory:
    """x and its norm; and the exponentials of the logits, in fp32, for which fp32 logits make room; or in chunks no logits at all."""
    parts = 2 * sizes.whole if sizes.sequence_ranks > 1 else 0  # x put together, and the parts of its gradient's sum
    columns = sizes.logits // sizes.tokens
    lower = sizes.element < FP32
    product = columns * config.model.hidden_size * sizes.element if lower else 0  # to be added to the fp32 sum
    kept = norm_kept(config, sizes) + sizes.stream + (INT64 + 2) * sizes.tokens  # column, owned and counted of each target
    linear = sizes.whole + parts + product
    if config.train.loss_chunk_tokens is None:
        exponentials, cast = FP32 * sizes.logits, sizes.element * sizes.logits if lower else 0
        kept += exponentials + FP32 * sizes.tokens
        linear -= exponentials - cast if lower else 0  # in bf16 the gradient has taken their place
        return HeadMemory(kept, sizes.element * sizes.logits + sizes.whole, parts // 2 + cast, cast, linear)
    some = columns * min(config.train.loss_chunk_tokens, sizes.tokens)
    forward = some * (sizes.element + FP32 * lower)
    again = sizes.whole + 3 * FP32 * some  # logits and exponentials, and those of the chunk before
    gradient = sizes.whole + some * (sizes.element + FP32 + sizes.element * lower) + product  # of the weight, from the logits' own
    return HeadMemory(kept + parts // 2 + 2 * FP32 * sizes.tokens, 0, forward, again, gradient)


def start_kept(config: Config, sizes: Sizes) -> int:
    """The embedding's: where the tokens lie in the table, and the mask of dropout."""
    mask = FP32 * sizes.whole // sizes.element if config.model.dropout else 0
    return (INT64 + 1) * sizes.tokens * (config.parallel.tp > 1) + mask


def shared_by_blocks(config: Config, sizes: Sizes) -> int:
    """What a stage makes once a micro-batch for all of its blocks: cosines and sines, and the mask of documents [b, 1, s, s]."""
    seq_len, documents = config.data.seq_len, config.data.document_mask
    rope = config.model.position == "rope"
    tables = FP32 * config.model.head_size * (sizes.tokens if documents else seq_len) if rope else 0
    as_mask = documents and (not sizes.on_gpu or config.model.dropout > 0)  # else a GPU's kernel is told where documents begin
    return tables + (sizes.element * sizes.tokens * seq_len if as_mask else 0)
