"""What a stage computes for one micro-batch, operation by operation, as the modules of `model/` and `tensor_parallel/` do it.

b, s, h: micro-batch, sequence, hidden size; n = b s tokens; t = tp. Counted are matrix products and the bytes of what passes over memory:
a pass over [n, h] is n h elements. Fused attention reads and writes no scores, leaves out the half of them that causality hides, and
makes them once more in backward (Dao et al. 2022, arXiv:2205.14135). Under sequence parallelism norms, residuals, dropout and
row biases see n/t tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.plan.kernels import Product, Work

_FP32_BYTES = 4
_NOTHING = Work()
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
"""Of what layers compute in, by `train.precision`."""


@dataclass(frozen=True)
class Part:
    """A piece of the model on one rank, for one micro-batch."""

    forward: Work = _NOTHING
    input_gradient: Work = _NOTHING
    """Of its backward what leads to the piece before."""
    weight_gradient: Work = _NOTHING
    """Of its backward what can be put off."""

    def __add__(self, other: Part) -> Part:
        return Part(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )


@dataclass(frozen=True)
class BlockWork:
    """One block, in the pieces that communication runs under."""

    attention_columns: Part
    mlp_columns: Part
    rest: Part
    again: Work
    """What the backward makes again."""

    @property
    def whole(self) -> Part:
        """All of it, without what is made again."""
        return self.attention_columns + self.mlp_columns + self.rest


@dataclass(frozen=True)
class EndsWork:
    """What the first and the last stage compute besides their blocks."""

    embedding: Part
    head: Part
    """The product that makes the logits."""
    loss: Part
    """The final norm and the cross entropy."""
    again: Work
    """What the backward makes again of the logits."""


def block_work(config: Config) -> BlockWork:
    """One block on one tp rank."""
    model, tp, n, local = config.model, config.parallel.tp, _tokens(config), _local_tokens(config)
    h, ffn, heads = model.hidden_size, model.ffn_hidden_size // tp, model.hidden_size // tp
    kv = max(model.kv_heads // tp, 1) * model.head_size
    attention_columns = _columns(config, n, h, [heads, kv, kv])
    mlp_columns = _columns(config, n, h, [ffn] * (2 if model.activation == "swiglu" else 1))
    attention, activation, norm = _attention(config, heads + kv), _activation(config, n * ffn), _norm(config, local)
    rows = _rows(config, n, local, heads, h) + _rows(config, n, local, ffn, h)
    rest = attention + activation + rows + norm + norm + _residual(config, local * h) + _residual(config, local * h)
    again = Work()
    if config.parallel.recompute == "full":
        again = attention_columns.forward + mlp_columns.forward + rest.forward
    elif config.parallel.recompute == "selective":
        again = norm.forward + norm.forward + activation.forward + (attention.forward if model.dropout else Work())
    return BlockWork(attention_columns, mlp_columns, rest, again)


def ends_work(config: Config) -> EndsWork:
    """The embedding, the head and the loss on one tp rank."""
    model, tp, n, local = config.model, config.parallel.tp, _tokens(config), _local_tokens(config)
    vocab = -(-model.vocab_size // tp)
    masks = 4 if tp > 1 else 0  # what other ranks own is masked, and the sum has a copy
    learned = model.position == "learned"
    look_up = _passes(config, n * model.hidden_size, 2 + masks) + _passes(config, local * model.hidden_size, 3 * learned)
    scatter = Work((), n * model.hidden_size * (ELEMENT_BYTES[config.train.precision] + 2 * _FP32_BYTES), 1)
    head = _columns(config, n, model.hidden_size, [vocab], bias=False)
    casts = n * vocab * (ELEMENT_BYTES[config.train.precision] + _FP32_BYTES) * (config.train.precision != "fp32")
    losses = n * vocab * _FP32_BYTES
    sums = Work((), 6 * losses + casts, 5)  # the maximum, its subtraction, exponentials, their sum
    gradient = Work((), 2 * losses + casts, 3)  # probabilities
    loss = _norm(config, local) + Part(sums, gradient)
    again = head.forward + sums if config.train.loss_chunk_tokens is not None else Work()
    return EndsWork(Part(look_up, scatter), head, loss, again)


def update_work(config: Config, kept: int, whole: int) -> Work:
    """After a step's last backward, and once before its first forward: norm, clipping, the optimizer, and the weights' copies in the dtype
    to compute in. kept: parameters that the rank keeps. whole: of its stages, gathered over dp."""
    optimizer, element = config.optimizer, ELEMENT_BYTES[config.train.precision]
    moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
    passes = 1 + 2 * (optimizer.grad_clip is not None) + 3 + 2 * moments  # norm, clip, weights and gradient, moments
    copied = 0.0
    if int(config.parallel.dp) > 1:  # fully_shard's: into and out of what is gathered, and what is reduced
        copied = whole * (2 * element + 2 * (element + _FP32_BYTES))
    elif element != _FP32_BYTES:
        copied = whole * (element + _FP32_BYTES)
    return Work((), kept * _FP32_BYTES * passes + copied, 10)


# ---- the pieces ------------------------------------------------------------------------------------------


def _columns(config: Config, n: int, inputs: int, outputs: Sequence[int], bias: bool | None = None) -> Part:
    """Column-parallel layers of one input: [n, inputs] -> [n, output] each."""
    bias = config.model.bias if bias is None else bias
    count = len(outputs)
    return Part(
        Work(tuple(Product(n, output, inputs) for output in outputs), 0.0, count),
        Work(tuple(Product(n, inputs, output) for output in outputs), 0.0, count),
        _weight_gradients(config, n, inputs, outputs, n if bias else 0),
    )


def _rows(config: Config, n: int, local: int, inputs: int, output: int) -> Part:
    """A row-parallel layer; its bias follows the sum over tp, and its bias's gradient is made at once."""
    bias = _passes(config, local * output, 2) if config.model.bias else Work()
    bias_gradient = _passes(config, local * output, 1) if config.model.bias else Work()
    return Part(
        Work((Product(n, output, inputs),), 0.0, 1) + bias,
        Work((Product(n, inputs, output),), 0.0, 1) + bias_gradient,
        _weight_gradients(config, n, inputs, [output], 0),
    )


def _weight_gradients(config: Config, n: int, inputs: int, outputs: Sequence[int], bias_rows: int) -> Work:
    """Products that add themselves to the fp32 gradients; in bf16 an addition of its own."""
    added, weights = 2 * _FP32_BYTES, inputs * sum(outputs)
    if config.train.precision != "fp32":
        added += 2 * ELEMENT_BYTES[config.train.precision]
    products = tuple(Product(output, inputs, n) for output in outputs)
    biases = _passes(config, bias_rows * sum(outputs), 1) if bias_rows else Work()
    kernels = len(outputs) * (1 if config.train.precision == "fp32" else 2)
    return Work(products, weights * added, kernels) + biases


def _attention(config: Config, turned: int) -> Part:
    """softmax(q k^T) v of this rank's heads. turned: columns of q and k, which rotary positions turn."""
    model, b, s, d = config.model, config.parallel.micro_batch_size, config.data.seq_len, config.model.head_size
    heads = b * model.num_heads // config.parallel.tp
    rotation = _passes(config, b * s * turned, 6) if model.position == "rope" else Work()
    if model.dropout:  # the weights exist as a matrix: scores, scale, mask, softmax in fp32, dropout
        products = (Product(s, s, d, heads), Product(s, d, s, heads))
        forward = Work(products) + _passes(config, heads * s * s, 16)
        backward = Work(products + products) + _passes(config, heads * s * s, 12)
    else:
        forward = Work((Product(s, s, d, heads / 2), Product(s, d, s, heads / 2)), 0.0, 1)
        backward = Work((Product(s, s, d, 2 * heads / 2), Product(s, d, s, 3 * heads / 2)), 0.0, 2)
    return Part(forward + rotation, backward + rotation)


def _activation(config: Config, elements: int) -> Part:
    """gelu, or silu(gate) * up."""
    reads_and_writes = (5, 11) if config.model.activation == "swiglu" else (2, 3)
    return Part(*(_passes(config, elements, passes) for passes in reads_and_writes))


def _norm(config: Config, tokens: int) -> Part:
    """A norm; its weights' gradients are made at once."""
    return Part(*(_passes(config, tokens * config.model.hidden_size, passes) for passes in (2, 5)))


def _residual(config: Config, elements: int) -> Part:
    """x + dropout(y), and in backward the sum of the two gradients."""
    dropped = 4 if config.model.dropout else 0
    return Part(_passes(config, elements, 3 + dropped), _passes(config, elements, 3 + dropped))


def _passes(config: Config, elements: int, passes: int) -> Work:
    """Reads and writes of so many elements; an operation has three of them, about."""
    return Work((), float(elements * passes * ELEMENT_BYTES[config.train.precision]), passes / 3)


def _tokens(config: Config) -> int:
    return config.parallel.micro_batch_size * config.data.seq_len


def _local_tokens(config: Config) -> int:
    """Tokens between the split layers."""
    return _tokens(config) // (config.parallel.tp if config.parallel.sequence_parallel else 1)
