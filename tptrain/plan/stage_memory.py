"""The memory of one pipeline stage, on the tp rank and the dp rank that hold the most: its weights, and what a micro-batch needs there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.plan.activations import Sizes, block_memory, norm_kept
from tptrain.plan.shards import Shard, block_shards, ends_shards

_FP32, _INT64 = 4, 8


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
    first_gradients: int
    """Of a stage's first backward: the gradients that exist when it is in the last layer, the head's and one of that layer."""
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
    memory, head = block_memory(config, sizes), _head(config, sizes) if is_last else _Ends(0, 0, 0, 0, 0)
    start = _start_kept(config, sizes) if is_first else 0
    shared = _shared_by_blocks(config, sizes)
    lower = element < _FP32
    # When the blocks' backward begins the loss has let go of what it kept, but for logits: a CPU keeps their memory, and put-off
    # weight gradients need their gradient.
    logits = element * sizes.logits if is_last and config.train.loss_chunk_tokens is None else 0
    remaining = 0 if sizes.on_gpu else logits
    passing = sizes.stream if is_last else 0  # the gradient that comes in is no message
    table, rows = (
        config.model.hidden_size * -(-size // config.parallel.tp) for size in (config.model.vocab_size, config.model.ffn_hidden_size)
    )
    return StageMemory(
        layers=(first_layer, last_layer),
        parameters=_FP32 * kept,
        gradients=_FP32 * kept,
        optimizer=_FP32 * kept * states,
        copies=element * whole if lower and dp == 1 else 0,
        gathered_weights=element * whole if dp > 1 else 0,
        gathered_gradients=_FP32 * whole if dp > 1 else 0,
        gathered_end=(element + _FP32) * (block[1] + ends[1]) if dp > 1 else 0,
        reducing=_FP32 * max(block[1], ends[1]) if dp > 1 else 0,
        first_gradients=(element if dp > 1 else _FP32) * (rows + table * is_last),
        activations=layers * memory.kept + head.kept + start + shared,
        deferred=layers * memory.deferred + head.deferred,
        forward_extra=max(memory.forward_extra - head.kept, head.forward_extra),
        backward_extra=max(head.backward_extra, memory.backward_extra - head.kept + remaining + passing),
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
    return _INT64 * (rows * (2 * config.data.seq_len + 1) + documents) if is_end or documents else 0


def _shared_by_blocks(config: Config, sizes: Sizes) -> int:
    """What a stage makes once a micro-batch for all of its blocks: cosines and sines, and the mask of documents [b, 1, s, s]."""
    seq_len, documents = config.data.seq_len, config.data.document_mask
    rope = config.model.position == "rope"
    tables = _FP32 * config.model.head_size * (sizes.tokens if documents else seq_len) if rope else 0
    as_mask = documents and (not sizes.on_gpu or config.model.dropout > 0)  # else a GPU's kernel is told where documents begin
    return tables + (sizes.element * sizes.tokens * seq_len if as_mask else 0)


def _elements(shards: Iterable[Shard], dp: int) -> tuple[int, int]:
    """Elements that a dp rank keeps, padding included, and those of all dp ranks."""
    shards = list(shards)
    whole = sum(shard.padded_elements(dp) for shard in shards)
    return whole // dp, whole


@dataclass(frozen=True)
class _Ends:
    """The final norm, the head and the loss."""

    kept: int
    deferred: int
    forward_extra: int
    backward_extra: int
    chunk: int


def _start_kept(config: Config, sizes: Sizes) -> int:
    """The embedding's: where the tokens lie in the table, and the mask of dropout."""
    mask = _FP32 * sizes.whole // sizes.element if config.model.dropout else 0
    return (_INT64 + 1) * sizes.tokens * (config.parallel.tp > 1) + mask


def _head(config: Config, sizes: Sizes) -> _Ends:
    """x and its norm; the exponentials of the logits, in fp32 in the logits' own memory, or of a chunk at a time nothing."""
    parts = 2 * sizes.whole if sizes.sequence_ranks > 1 else 0
    gathered = sizes.whole if sizes.sequence_ranks > 1 else 0
    product = 0 if sizes.element == _FP32 else sizes.logits // sizes.tokens * config.model.hidden_size * sizes.element
    norm = norm_kept(config, sizes) + sizes.stream
    places = (_INT64 + 2) * sizes.tokens  # column, owned and counted of each target
    chunk = config.train.loss_chunk_tokens
    if chunk is None:
        lower = sizes.element * sizes.logits if sizes.element < _FP32 else 0
        kept = norm + _FP32 * sizes.logits + _FP32 * sizes.tokens + places
        linear = sizes.whole + parts + product - (_FP32 * sizes.logits - lower if lower else 0)
        return _Ends(kept, sizes.element * sizes.logits + sizes.whole, gathered + lower, max(lower, linear), 0)
    rows = min(chunk, sizes.tokens)
    some = sizes.logits // sizes.tokens * rows
    kept = norm + gathered + 2 * _FP32 * sizes.tokens + places
    lower = sizes.element < _FP32
    forward = some * (sizes.element + _FP32 * lower)
    backward = some * (3 * _FP32) + sizes.whole + product  # logits and exponentials, and those of the chunk before
    return _Ends(kept, 0, forward, backward, some)
