"""The config.json of a model, for both ways: from our keys to theirs, and which of our keys follow from theirs. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tptrain.checkpoint.hugging_face.mapping import FAMILIES, GPT2, LLAMA, family_of
from tptrain.config import ModelConfig

_KEYS = {
    GPT2: {
        "vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_layers", "n_head": "num_heads", "n_inner": "ffn_hidden_size",
        "n_positions": "max_seq_len", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings",
    },
    LLAMA: {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta", "tie_word_embeddings": "tie_embeddings",
    },
}  # fmt: skip
"""Their key for each of ours."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    GPT2: {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    LLAMA: {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False},
}
"""What a config.json may leave out."""
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    GPT2: {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    LLAMA: {"hidden_act": ("silu", "swish")},
}  # fmt: skip
"""Keys that have one meaning here, where they are given."""


class UnsupportedConfig(ValueError):
    """A config.json asks for what no config here expresses. The message says what."""


def to_hugging_face(model: ModelConfig, end_of_document: int | None) -> dict[str, Any]:
    """The config.json of a model of either family, which AutoModelForCausalLM reads. end_of_document: its id, if there is one."""
    family = family_of(model)
    assert family is not None, "asked before"
    values: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in _KEYS[family].items()}
    if family == GPT2:
        dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
        values |= {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", **dict.fromkeys(dropouts, model.dropout)}
    else:
        values |= {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_dropout": model.dropout}
        values |= {"num_key_value_heads": model.kv_heads, "attention_bias": model.bias, "mlp_bias": model.bias}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rope_theta}  # from transformers 5 on
    values |= {"bos_token_id": end_of_document, "eos_token_id": end_of_document, "pad_token_id": None}
    return {"model_type": family, **values, "initializer_range": model.init_std, "dtype": "float32", "torch_dtype": "float32"}


def from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model`, with their values, that follow from a config.json; dropout is for the training to choose.

    Where positions have no weights, how many there are is for the training to choose too. Raises UnsupportedConfig.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedConfig(f"model_type={family}, which is neither gpt2 nor llama")
    for key, known in _ONLY[family].items():
        if config.get(key, known[0]) not in known:
            raise UnsupportedConfig(f"{key}={config[key]}")
    given = {**_DEFAULTS[family], **config, **(_rope(config) if family == LLAMA else {})}
    missing = [theirs for theirs in _KEYS[family] if theirs not in given]
    if missing:
        raise UnsupportedConfig(f"no {missing[0]}")
    values = {**FAMILIES[family], **{ours: given[theirs] for theirs, ours in _KEYS[family].items()}}
    if family == GPT2:
        values["num_kv_heads"] = values["num_heads"]
        values["ffn_hidden_size"] = values["ffn_hidden_size"] or 4 * values["hidden_size"]
        return values
    values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
    values["bias"] = bool(given.get("attention_bias"))
    if bool(given.get("mlp_bias")) != values["bias"]:
        raise UnsupportedConfig(f"attention_bias={given.get('attention_bias')} with mlp_bias={given.get('mlp_bias')}")
    if given.get("head_dim") not in (None, values["hidden_size"] // values["num_heads"]):
        raise UnsupportedConfig(f"head_dim={given['head_dim']}, which is not hidden_size / num_attention_heads")
    del values["max_seq_len"]
    return values


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base of the rotation, in either of the two forms that `transformers` has had. Raises UnsupportedConfig where it is scaled."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedConfig(f"rope_type={kind}: rotary positions that are scaled")
    return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
