"""The memory of one pipeline stage, on the tp rank and the dp rank that hold the most: its weights, and what a micro-batch needs there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.plan.activations import FP32, INT64, Sizes, block_memory
from tptrain.plan.ends_memory import NO_HEAD, head_memory, shared_by_blocks, start_kept
from tptrain.plan.shards import Shard, block_shards, ends_shards


@dataclass(frozen=True)
class StageMemory:
    """Bytes. Of a micro-batch where it says so."""

    layers: tuple[int, int]
    """The first and one past the last."""
    parameters: int
    """fp32 weights that the rank keeps."""
    gradients: int
    """Their gradients, once they are whole."""
    optimizer: int
    """The optimizer's state."""
    copies: int
    """bf16 weights; with dp>1 they are among what is gathered."""
    gathered_weights: int
    """With dp>1: the weights to compute with, whole, from the first forward to the last backward of a step."""
    gathered_gradients: int
    """With dp>1: the gradients, whole, from the first backward to the last one of a step."""
    gathered_end: int
    """With dp>1: what of both is still whole when the last backward is in the first layer; a layer's is summed and let go of by then."""
    reducing: int
    """With dp>1: the buffers of the largest sum of gradients over dp."""
    activations: int
    """Of a micro-batch, kept from its forward to its backward, the stage's input among it."""
    deferred: int
    """Of a micro-batch, kept from its input gradient to its weight gradient."""
    forward_extra: int
    """Of a micro-batch: at the forward's peak, beyond what it keeps."""
    backward_extra: int
    """Of a micro-batch: at the backward's peak, beyond what was kept and the gradient that comes in."""
    last_extra: int
    """Of a micro-batch: when the backward is in the first layer, beyond what is kept of it."""
    first_backward_extra: int
    """As backward_extra, of the stage's first, with the gradients that it has made by then: the head's and one of the last layer."""
    unmade_gradients: int
    """When the stage's first backward is in the first layer: the gradients that are still to come."""
    input_gradient_extra: int
    """As backward_extra, where weight gradients are put off."""
    last_input_gradient_extra: int
    """As last_extra, where weight gradients are put off."""
    message: int
    """Of a micro-batch: the activations or gradients between stages."""
    logits: int
    """Of a micro-batch on a CPU: the logits' memory, which is kept for the next."""
    first_layer_activations: int
    """Of a micro-batch: what is still kept when backward has reached the first layer."""
    first_layer_deferred: int
    """Of a micro-batch: what that layer will have put off."""
    is_first: bool
    is_last: bool

    @property
    def gathered(self) -> int:
        """With dp>1: weights and gradients whole."""
        return self.gathered_weights + self.gathered_gradients

    @property
    def is_end(self) -> bool:
        """Whether it reads tokens or targets."""
        return self.is_first or self.is_last


def stage_memory(config: Config, first_layer: int, last_layer: int) -> StageMemory:
    """A stage with these layers, the last one exclusive, of a resolved config."""
    sizes = Sizes.of(config)
    is_first, is_last = first_layer == 0, last_layer == config.model.num_layers
    layers, dp, element = last_layer - first_layer, int(config.parallel.dp), sizes.element
    block, ends = _elements(block_shards(config), dp), _elements(ends_shards(config, is_first, is_last), dp)
    kept, whole = layers * block[0] + ends[0], layers * block[1] + ends[1]
    states = {"adamw": 2, "sgd": 1 if config.optimizer.momentum else 0}[config.optimizer.name]
    memory, head = block_memory(config, sizes), head_memory(config, sizes) if is_last else NO_HEAD
    start = start_kept(config, sizes) if is_first else 0
    shared = shared_by_blocks(config, sizes)
    lower = element < FP32
    # When the blocks' backward begins the loss has let go of what it kept, but for logits: a CPU keeps their memory, and put-off
    # weight gradients need their gradient.
    logits = element * sizes.logits if is_last and config.train.loss_chunk_tokens is None else 0
    remaining = 0 if sizes.on_gpu else logits
    passing = sizes.stream if is_last else 0  # the gradient that comes in is no message
    table, rows = (
        config.model.hidden_size * -(-size // config.parallel.tp) for size in (config.model.vocab_size, config.model.ffn_hidden_size)
    )
    table *= is_last
    sums = element if dp > 1 else FP32  # bytes of a gradient that a micro-batch makes
    top = memory.backward_extra - head.kept + remaining + passing
    return StageMemory(
        layers=(first_layer, last_layer),
        parameters=FP32 * kept,
        gradients=FP32 * kept,
        optimizer=FP32 * kept * states,
        copies=element * whole if lower and dp == 1 else 0,
        gathered_weights=element * whole if dp > 1 else 0,
        gathered_gradients=FP32 * whole if dp > 1 else 0,
        gathered_end=(element + FP32) * (block[1] + ends[1]) if dp > 1 else 0,
        reducing=FP32 * max(block[1], ends[1]) if dp > 1 else 0,
        activations=layers * memory.kept + head.kept + start + shared,
        deferred=layers * memory.deferred + head.deferred,
        forward_extra=max(memory.forward_extra - head.kept, head.forward_extra),
        backward_extra=max(head.backward_extra, top),
        first_backward_extra=max(head.loss_extra, head.linear_extra + sums * table, top + sums * (table + rows)),
        unmade_gradients=FP32 * (block[1] - rows),
        last_extra=memory.backward_extra + sizes.stream + remaining,
        input_gradient_extra=max(head.backward_extra, memory.input_gradient_extra - head.kept + head.deferred + passing),
        last_input_gradient_extra=memory.input_gradient_extra + sizes.stream,
        message=sizes.stream,
        logits=remaining,
        first_layer_activations=memory.kept + start + shared,
        first_layer_deferred=memory.deferred,
        is_first=is_first,
        is_last=is_last,
    )  # fmt: skip


def batch_bytes(config: Config, is_end: bool) -> int:
    """The step's tokens on a rank that reads them: rows of seq_len + 1, and the inputs once more. With data.document_mask every rank reads
    them, and holds each token's document and position, and the targets once more.
    """
    rows = config.parallel.micro_batch_size * config.parallel.micro_batches
    documents = 3 * rows * config.data.seq_len if config.data.document_mask else 0
    return INT64 * (rows * (2 * config.data.seq_len + 1) + documents) if is_end or documents else 0


def _elements(shards: Iterable[Shard], dp: int) -> tuple[int, int]:
    """Elements that a dp rank keeps, padding included, and those of all dp ranks."""
    shards = list(shards)
    whole = sum(shard.padded_elements(dp) for shard in shards)
    return whole // dp, whole
