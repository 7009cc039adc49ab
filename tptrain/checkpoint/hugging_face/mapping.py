"""Which tensor of `transformers` holds which parameter, for both ways. Knows no torch.

    GPT2LMHeadModel     learned positions, LayerNorm, GELU, biases. Its matrices are [in, out], ours [out, in]; q, k and v lie side by
                        side in one tensor: c_attn [h, 3h] = [q^T | k^T | v^T]
    LlamaForCausalLM    rotary positions, RMSNorm, SwiGLU, with biases or without. A tensor is a parameter as it stands: both
                        turn element i of a head with element i + d/2

The embedding is there without padding, and a tied head not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.config import ModelConfig

GPT2, LLAMA = "gpt2", "llama"
FAMILIES: dict[str, dict[str, object]] = {
    GPT2: {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    LLAMA: {"position": "rope", "norm": "rmsnorm", "activation": "swiglu"},
}
"""What a model of each family has, by its `model_type`."""
PREFIXES = {GPT2: "transformer.", LLAMA: "model."}
"""What all names but the head's begin with; files of a model without a head leave it out."""

_GPT2_LINEARS = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
_GPT2_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_LLAMA_LINEARS = {
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
_LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Place:
    """Where one parameter lies."""

    tensor: str
    """The tensor's name."""
    shape: tuple[int, ...]
    """The whole parameter's own shape: [out, in], or [out] of a vector."""
    start: int = 0
    """The first of its outputs among the tensor's."""
    transposed: bool = False
    """Whether the tensor is [in, out]."""

    def region(self, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
        """What of the tensor holds a rectangle of the parameter; transposed, as the tensor is.

        >>> Place("c_attn", (4, 4), start=8, transposed=True).region((2, 0), (2, 4))
        (slice(0, 4, None), slice(10, 12, None))
        """
        rows, *columns = (slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))
        ours = [slice(self.start + rows.start, self.start + rows.stop), *columns]
        return tuple(reversed(ours)) if self.transposed else tuple(ours)


def family_of(model: ModelConfig) -> str | None:
    """The `model_type` that expresses a model, or None where neither does."""
    for family, values in FAMILIES.items():
        if all(getattr(model, key) == value for key, value in values.items()):
            return family if family == LLAMA or model.kv_heads == model.num_heads else None
    return None


def places(model: ModelConfig) -> dict[str, Place]:
    """Of each parameter, by its name in the whole model, where it lies. Raises ValueError for a model of neither family."""
    family = family_of(model)
    if family is None:
        raise ValueError("neither GPT-2 nor Llama")
    prefix, whole = PREFIXES[family], (model.vocab_size, model.hidden_size)
    names = ("wte", "h", "ln_f") if family == GPT2 else ("embed_tokens", "layers", "norm")
    embedding, layers, final_norm = (prefix + name for name in names)
    found = {"embedding.weight": Place(f"{embedding}.weight", whole)}
    if family == GPT2:
        found["positions.weight"] = Place(f"{prefix}wpe.weight", (model.max_seq_len, model.hidden_size))
    for layer in range(model.num_layers):
        block = _gpt2_block(model) if family == GPT2 else _llama_block(model)
        for name, place in block.items():
            tensor = f"{layers}.{layer}.{place.tensor}"
            found[f"layers.{layer}.{name}"] = Place(tensor, place.shape, place.start, place.transposed)
    for kind in ("weight", "bias") if family == GPT2 else ("weight",):
        found[f"final_norm.{kind}"] = Place(f"{final_norm}.{kind}", (model.hidden_size,))
    if not model.tie_embeddings:
        found["head.weight"] = Place("lm_head.weight", whole)
    return found


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that hold a model, with their shapes, first layer first."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places(model).values():
        outputs, *inputs = place.shape
        whole = (place.start + outputs, *inputs)  # the last part of a tensor ends where the tensor does
        shapes[place.tensor] = tuple(reversed(whole)) if place.transposed else whole
    return shapes


def _linear_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of the linear layers of a block, but for an MLP's gate."""
    hidden, inner, kv_size = model.hidden_size, model.ffn_hidden_size, model.kv_heads * model.head_size
    attention = {"q": (hidden, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "out": (hidden, hidden)}
    shapes = {f"attention.{name}": shape for name, shape in attention.items()}
    return {**shapes, "mlp.up": (inner, hidden), "mlp.down": (hidden, inner)}


def _gpt2_block(model: ModelConfig) -> dict[str, Place]:
    hidden, shapes, block = model.hidden_size, _linear_shapes(model), {}
    for number, letter in enumerate("qkv"):
        name, start = f"attention.{letter}", number * hidden
        block[f"{name}.weight"] = Place("attn.c_attn.weight", shapes[name], start, transposed=True)
        block[f"{name}.bias"] = Place("attn.c_attn.bias", shapes[name][:1], start)
    for name, tensor in _GPT2_LINEARS.items():
        block[f"{name}.weight"] = Place(f"{tensor}.weight", shapes[name], transposed=True)
        block[f"{name}.bias"] = Place(f"{tensor}.bias", shapes[name][:1])
    for name, tensor in _GPT2_NORMS.items():
        for kind in ("weight", "bias"):
            block[f"{name}.{kind}"] = Place(f"{tensor}.{kind}", (hidden,))
    return block


def _llama_block(model: ModelConfig) -> dict[str, Place]:
    shapes, block = _linear_shapes(model), {}
    shapes["mlp.gate"] = shapes["mlp.up"]
    for name, tensor in _LLAMA_LINEARS.items():
        block[f"{name}.weight"] = Place(f"{tensor}.weight", shapes[name])
        if model.bias:
            block[f"{name}.bias"] = Place(f"{tensor}.bias", shapes[name][:1])
    for name, tensor in _LLAMA_NORMS.items():
        block[f"{name}.weight"] = Place(f"{tensor}.weight", (model.hidden_size,))
    return block
