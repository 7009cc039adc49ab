"""Parameters and model FLOPs by formula, without building anything."""

from __future__ import annotations

from tptrain.config import ModelConfig


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, a tied embedding counted once."""
    return stage_parameters(model, 0, model.num_layers)


def stage_parameters(model: ModelConfig, first_layer: int, last_layer: int) -> int:
    """Parameters of the stage with layers first_layer to last_layer (exclusive), over all its tp ranks.

    The stage with layer 0 also has the embedding and the positions, the one with the last layer the final norm and the head, or of
    several stages its own copy of a tied embedding.
    """
    h, ffn, bias = model.hidden_size, model.ffn_hidden_size, int(model.bias)
    kv, columns = model.kv_heads * model.head_size, _mlp_columns(model)
    norm = h * (1 + bias * (model.norm == "layernorm"))
    attention = 2 * (h * h + bias * h) + 2 * (kv * h + bias * kv)
    mlp = columns * (h * ffn + bias * ffn) + ffn * h + bias * h
    is_first, is_last = first_layer == 0, last_layer == model.num_layers
    embeddings = max(is_first, is_last) if model.tie_embeddings else is_first + is_last
    positions = model.max_seq_len * h if is_first and model.position == "learned" else 0
    return (last_layer - first_layer) * (attention + mlp + 2 * norm) + embeddings * model.vocab_size * h + positions + is_last * norm


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one token's forward and backward at this sequence length, recomputation not counted.

    Backward costs twice the forward.
    """
    return 3 * (model.num_layers * block_flops(model, seq_len) + head_flops(model))


def block_flops(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of one token's forward through one block at this sequence length.

    A multiply-add is 2 FLOPs. Counted are the matrix products of the weights, and attention's two products over the whole sequence,
    not its causal half: the convention of the PaLM paper (Chowdhery et al. 2022, appendix B) and of most published MFU figures.
    """
    h, ffn, kv = model.hidden_size, model.ffn_hidden_size, model.kv_heads * model.head_size
    weights = 2 * h * h + 2 * kv * h + (_mlp_columns(model) + 1) * h * ffn
    return 2 * weights + attention_flops(model, seq_len)


def attention_flops(model: ModelConfig, seq_len: int) -> int:
    """The part of `block_flops` that no weight has a share in. Its backward costs twice as much and makes input gradients alone."""
    return 2 * 2 * model.hidden_size * seq_len


def head_flops(model: ModelConfig) -> int:
    """FLOPs of one token's logits."""
    return 2 * model.vocab_size * model.hidden_size


def _mlp_columns(model: ModelConfig) -> int:
    """Matrices [ffn, h] of the MLP: up, and with swiglu a gate."""
    return 2 if model.activation == "swiglu" else 1
