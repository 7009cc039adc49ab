"""What one micro-batch keeps of a transformer block and of the loss, from its forward to its backward, on one tp rank; in bytes.

Read off the code: `model/` and `tensor_parallel/linear.py` say what is saved, and for how long names hold the rest.

    attention   x · norm(x) · q, k, v · what attention's backward needs · its output          mlp   x · norm(x) · up (gate) · activated

Under sequence parallelism x and norm(x) are [b, s/tp, h]; what the split layers make has 1/tp of the features in any case. The count is
that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4), with the differences of this code: attention is one kernel that keeps no
[s, s] matrix but under dropout, masks are fp32 numbers, and nothing is kept twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from tptrain.config import Config

FP32, INT64 = 4, 8
"""Bytes of a number."""
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}
"""Of a number that layers compute with, by `train.precision`."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of one micro-batch on the tp rank that holds the most."""

    element: int
    """Of a number to compute with."""
    tokens: int
    """b * s, no bytes."""
    own_tokens: int
    """Those of this rank's part of the sequence."""
    stream: int
    """[b, s, h], under sequence parallelism [b, s/tp, h]: what goes from block to block and from stage to stage."""
    whole: int
    """[b, s, h]."""
    query: int
    """[b, s, h/tp]: q, and attention's output."""
    key: int
    """[b, s, kv_heads/tp * d]: k, or v."""
    inner: int
    """[b, s, ffn/tp]: up, gate or their activation."""
    scores: int
    """[b, heads/tp, s, s], numbers, no bytes: exists under dropout alone."""
    logits: int
    """[b, s, vocab/tp], numbers, no bytes."""
    heads: int
    """heads/tp."""
    sequence_ranks: int
    """tp under sequence parallelism, else 1."""
    on_gpu: bool

    @staticmethod
    def of(config: Config) -> Sizes:
        """For a resolved config. hardware.device=auto counts as a GPU where the memory of one is given."""
        model, parallel = config.model, config.parallel
        element, tp = COMPUTE_BYTES[config.train.precision], parallel.tp
        tokens = parallel.micro_batch_size * config.data.seq_len
        split = tp if parallel.sequence_parallel else 1
        whole = tokens * model.hidden_size * element
        heads = model.num_heads // tp
        return Sizes(
            element=element,
            tokens=tokens,
            own_tokens=tokens // split,
            stream=whole // split,
            whole=whole,
            query=whole // tp,
            key=tokens * max(1, model.kv_heads // tp) * model.head_size * element,
            inner=tokens * model.ffn_hidden_size // tp * element,
            scores=tokens * config.data.seq_len * heads,
            logits=tokens * -(-model.vocab_size // tp),
            heads=heads,
            sequence_ranks=split,
            on_gpu=config.hardware.device != "cpu",
        )


@dataclass(frozen=True)
class BlockMemory:
    """Of one block and one micro-batch."""

    kept: int
    """From the end of the forward to the backward."""
    deferred: int
    """From the input gradient to the weight gradient: two matrices of each linear layer."""
    forward_extra: int
    """At the forward's peak, beyond what earlier blocks and this one keep; negative where that is not all made yet is left out."""
    backward_extra: int
    """At the backward's peak, beyond what is kept before it and the gradient that comes in."""
    input_gradient_extra: int
    """The same where weight gradients are put off, whose matrices stay."""


def block_memory(config: Config, sizes: Sizes) -> BlockMemory:
    """The block under `parallel.recompute`."""
    attention, mlp = _attention_kept(config, sizes), _mlp_kept(config, sizes)
    kept = attention + mlp
    forward = max(_attention_forward(config, sizes) - kept, _mlp_forward(config, sizes) - kept, _mlp_end(config, sizes))
    of_attention = _attention_backward(config, sizes)
    backward = max(_mlp_backward(config, sizes), of_attention - mlp)
    deferred = _deferred(config, sizes)
    putting_off = max(_mlp_input_gradient(config, sizes), of_attention - mlp + _mlp_deferred(config, sizes))
    if config.parallel.recompute != "full":
        return BlockMemory(kept, deferred, forward, backward, putting_off)
    # Without gradients nothing is kept but x and what names hold; backward runs the forward again, as if all were kept.
    made_again = kept - sizes.stream * _norm_keeps_input(config, sizes)
    forward_again = max(forward, 0) + sizes.stream
    alone = _forward_alone(config, sizes)
    again = made_again + max(backward, forward_again)
    return BlockMemory(sizes.stream, deferred, alone, again, made_again + max(putting_off, forward_again))


# ---- what is kept ------------------------------------------------------------------------------------------


def norm_kept(config: Config, sizes: Sizes) -> int:
    """What a norm's backward needs besides its output: its input x and a number or two a token."""
    numbers = FP32 * sizes.own_tokens
    if config.model.norm == "layernorm":
        return sizes.stream + 2 * numbers  # mean and 1 / deviation
    if sizes.on_gpu:
        return sizes.stream + numbers  # one kernel: x, 1 / root mean square
    # On a CPU it is several operations, in fp32: x and x / root mean square. x as it came is then not needed.
    return (
        2 * sizes.stream * FP32 // sizes.element
        + numbers
        + sizes.stream * (config.parallel.recompute == "selective") * (sizes.element < FP32)
    )


def _norm_keeps_input(config: Config, sizes: Sizes) -> bool:
    """Whether x itself is kept by a norm, rather than a copy of it."""
    return config.model.norm == "layernorm" or sizes.on_gpu or sizes.element == FP32


def _forgets(config: Config) -> bool:
    return config.parallel.recompute == "selective"


def _dropout_mask(config: Config, sizes: Sizes) -> int:
    """Dropout before a residual sum multiplies with an fp32 mask, of the whole sequence also where x is a part of it."""
    return FP32 * sizes.whole // sizes.element if config.model.dropout else 0


def _attention_kept(config: Config, sizes: Sizes) -> int:
    """x, its norm, q, k, v, the output; and the masks' and the softmax's matrices, or the softmax's sums."""
    kept = norm_kept(config, sizes) + sizes.query + _dropout_mask(config, sizes)
    kept += 0 if _forgets(config) else sizes.stream
    if not config.model.dropout:
        return kept + sizes.query + 2 * sizes.key + FP32 * sizes.tokens * sizes.heads  # the sum of exponentials of each row and head
    if _forgets(config):
        return kept + sizes.query + 2 * sizes.key
    # q, k, v in copies, k and v repeated for each query head; the weights in fp32, their mask, what is left of them; what is in the future
    return kept + 3 * sizes.query + sizes.scores * (2 * FP32 + sizes.element) + config.data.seq_len**2


def _mlp_kept(config: Config, sizes: Sizes) -> int:
    """x, its norm, up (and gate), the activation."""
    kept = norm_kept(config, sizes) + _columns(config) * sizes.inner + _dropout_mask(config, sizes)
    return kept if _forgets(config) else kept + sizes.stream + sizes.inner


def _columns(config: Config) -> int:
    """Column layers of the MLP."""
    return 2 if config.model.activation == "swiglu" else 1


def _deferred(config: Config, sizes: Sizes) -> int:
    """Input and output's gradient of each layer, whole along the sequence: q, k and v share an input, and so do gate and up."""
    attention = 2 * sizes.whole + sizes.query + sizes.query + 2 * sizes.key
    return attention + _mlp_deferred(config, sizes)


def _mlp_deferred(config: Config, sizes: Sizes) -> int:
    """The MLP's of them."""
    return 2 * sizes.whole + (_columns(config) + 1) * sizes.inner


# ---- what comes and goes in forward ------------------------------------------------------------------------


def _row_sum(sizes: Sizes) -> int:
    """A row layer's partial product and its sum over tp: in place, or the others' parts and a sum beside it."""
    return sizes.whole + (sizes.whole if sizes.sequence_ranks > 1 else 0)


def _mlp_end(config: Config, sizes: Sizes) -> int:
    """Beyond all that is kept: at the row layer attention's last output, or at the end y and x + y, with dropout also y's product."""
    dropped = FP32 * sizes.stream // sizes.element if config.model.dropout else 0
    forgotten = sizes.stream + sizes.inner if _forgets(config) else 0
    return max(forgotten + sizes.stream + _row_sum(sizes), 2 * sizes.stream + dropped)


def _mlp_forward(config: Config, sizes: Sizes) -> int:
    """All of the block when gate and up are multiplied: silu(gate) beside its product."""
    if config.model.activation != "swiglu":
        return 0
    kept = _attention_kept(config, sizes) + _mlp_kept(config, sizes)
    names = sizes.stream + (0 if _norm_keeps_input(config, sizes) or _forgets(config) else 2 * sizes.stream)  # y; x before and between
    return kept + sizes.inner + names + (sizes.stream + sizes.inner if _forgets(config) else 0)


def _attention_forward(config: Config, sizes: Sizes) -> int:
    """All of the block at attention's peak: with dropout, the weights as a matrix in several forms."""
    if not config.model.dropout:
        return 0
    if _forgets(config):
        return _attention_kept(config, sizes) - _dropout_mask(config, sizes) + _weights_made(sizes) + 2 * sizes.query
    kept = _attention_kept(config, sizes) - sizes.query - _dropout_mask(config, sizes)
    lower = sizes.element < FP32
    passing = sizes.scores * (sizes.element + FP32 + lower * (sizes.element + FP32))  # scores, masks a head; weights and product to be cast
    return kept + sizes.query + 2 * sizes.key + passing


def _weights_made(sizes: Sizes) -> int:
    """Attention under dropout with nothing kept: scores, weights, masks a head, the masks together and their product with the weights."""
    return sizes.scores * (2 * sizes.element + 3 * FP32) + sizes.query


def _forward_alone(config: Config, sizes: Sizes) -> int:
    """A block's forward of which nothing is kept, beyond x: what names hold at the MLP, or under dropout in attention."""
    names = 3 * sizes.stream  # x between, y of attention, the norm's output
    columns = _columns(config)
    mlp = names + max((columns + 1) * sizes.inner + _row_sum(sizes), (columns + 2) * sizes.inner if columns > 1 else 0)
    if not config.model.dropout:
        return mlp
    return max(mlp, sizes.stream + sizes.query + 2 * sizes.key + _weights_made(sizes) + sizes.query)


# ---- what comes and goes in backward -----------------------------------------------------------------------


def _cast_product(config: Config, sizes: Sizes) -> int:
    """A weight gradient of the compute dtype, before it is added to the fp32 sum."""
    if sizes.element == FP32:
        return 0
    return config.model.hidden_size * config.model.ffn_hidden_size // config.parallel.tp * sizes.element


def _gathered(sizes: Sizes) -> int:
    """Under sequence parallelism, what is put together from the ranks' parts; a GPU's library call needs a second copy."""
    return sizes.whole if sizes.sequence_ranks > 1 else 0


def _mlp_backward(config: Config, sizes: Sizes) -> int:
    """Beyond what is kept: the row layer, the activation, or the column layers, whichever needs most."""
    forgotten = sizes.inner if _forgets(config) else 0  # made again
    row = _gathered(sizes) + sizes.inner + forgotten + _cast_product(config, sizes)
    # With swiglu: the activation's gradient, gate's, silu(gate) and a product; the activation is gone.
    gate = (4 if _forgets(config) else 3) * sizes.inner if config.model.activation == "swiglu" else 0
    column = forgotten - sizes.inner + _columns_backward(sizes) + (sizes.stream if _forgets(config) else 0) + _cast_product(config, sizes)
    return max(row, gate, column)


def _mlp_input_gradient(config: Config, sizes: Sizes) -> int:
    """The same where the activation and the gradients of both layers' outputs stay for the weight gradients."""
    forgotten = sizes.inner if _forgets(config) else 0
    activation = (4 if config.model.activation == "swiglu" else 2) * sizes.inner
    column = _columns_backward(sizes) + (sizes.stream if _forgets(config) else 0)
    return _gathered(sizes) + forgotten + max(activation, column)


def _columns_backward(sizes: Sizes) -> int:
    """x's gradient; under sequence parallelism x put together, and the sum of the gradient's parts."""
    return sizes.whole + 2 * _gathered(sizes)


def _attention_backward(config: Config, sizes: Sizes) -> int:
    """Beyond what is kept of attention."""
    gradients = sizes.query + 2 * sizes.key
    if not config.model.dropout:
        return _columns_backward(sizes) + (sizes.stream if _forgets(config) else 0)
    if _forgets(config):  # the weights are made again first
        return _weights_made(sizes) + 2 * sizes.query
    return sizes.scores * FP32 + gradients  # of what is left of the weights: two gradients beside each other, one matrix freed
