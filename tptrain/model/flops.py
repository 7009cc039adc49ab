"""Parameters and model FLOPs by formula, without building anything."""

from __future__ import annotations

from tptrain.config import ModelConfig


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, a tied embedding counted once."""
    h, ffn, layers, bias = model.hidden_size, model.ffn_hidden_size, model.num_layers, int(model.bias)
    kv, columns = model.kv_heads * model.head_size, _mlp_columns(model)
    norm = h * (1 + bias * (model.norm == "layernorm"))
    attention = 2 * (h * h + bias * h) + 2 * (kv * h + bias * kv)
    mlp = columns * (h * ffn + bias * ffn) + ffn * h + bias * h
    embedding = model.vocab_size * h
    head = 0 if model.tie_embeddings else embedding
    positions = model.max_seq_len * h if model.position == "learned" else 0
    return layers * (attention + mlp + 2 * norm) + embedding + positions + norm + head


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one token's forward and backward at this sequence length, recomputation not counted.

    A multiply-add is 2 FLOPs; backward costs twice the forward. Counted are the matrix products of the blocks and the
    head, and attention's two products over the whole sequence, not its causal half: the convention of the PaLM paper
    (Chowdhery et al. 2022, appendix B) and of most published MFU figures.
    """
    h, ffn, kv = model.hidden_size, model.ffn_hidden_size, model.kv_heads * model.head_size
    weights = model.num_layers * (2 * h * h + 2 * kv * h + (_mlp_columns(model) + 1) * h * ffn) + model.vocab_size * h
    attention = model.num_layers * 2 * h * seq_len
    return 3 * 2 * (weights + attention)


def _mlp_columns(model: ModelConfig) -> int:
    """Matrices [ffn, h] of the MLP: up, and with swiglu a gate."""
    return 2 if model.activation == "swiglu" else 1
