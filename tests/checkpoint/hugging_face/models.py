"""Models of both families as `transformers` saves them, with random values everywhere, and the tensors of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

VOCAB, LENGTH = 259, 16
GPT2_KEYS = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "ffn_hidden_size": 64, "max_seq_len": LENGTH}
LLAMA_KEYS = {
    **GPT2_KEYS, "num_kv_heads": 2, "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
    "rope_theta": 500.0, "norm_eps": 1e-3,
}  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {"gpt2": GPT2_KEYS, "llama": LLAMA_KEYS}
"""Keys of `model` for each family. Neither 2 nor 4 divides the vocabulary."""


def keys_of(family: str, tied: bool, **more: Any) -> dict[str, Any]:
    """Keys of `model`, as `small_config` takes them."""
    return {f"model__{key}": value for key, value in (KEYS[family] | {"tie_embeddings": tied} | more).items()}


def on_command_line(family: str, tied: bool) -> list[str]:
    """The same keys as arguments."""
    return [f"{key.replace('__', '.')}={str(value).lower()}" for key, value in keys_of(family, tied).items()]


def their_model(family: str, tied: bool, spread: float = 0.2, **more: Any) -> Any:
    """The model of those keys, made by transformers, with random values: biases are not zero, norms not one.

    spread: the standard deviation of what is added to transformers' initial values.
    """
    import transformers

    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_inner=64, n_positions=LENGTH, tie_word_embeddings=tied,
            bos_token_id=None, eos_token_id=None, **more,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=LENGTH, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, **more,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors_of(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor in a folder's safetensors, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert name not in found
                tensor = opened.get_tensor(name)
                found[name] = (str(tensor.dtype), list(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found
