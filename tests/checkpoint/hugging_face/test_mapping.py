"""The map of names and shapes: of our parameters as the model makes them, of their tensors as transformers does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.checkpoint.hugging_face.models import keys_of, their_model
from tests.support import small_config
from tptrain.checkpoint.hugging_face.mapping import family_of, places, tensor_shapes
from tptrain.checkpoint.hugging_face.model_config import UnsupportedConfig, from_hugging_face, to_hugging_face
from tptrain.mesh import Mesh
from tptrain.model.gpt import GPTStage

CASES: list[tuple[str, bool, dict[str, Any]]] = [
    ("gpt2", True, {}), ("gpt2", False, {}), ("llama", True, {}), ("llama", False, {}), ("llama", False, {"bias": True}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tied", "more"), CASES)
def test_every_tensor_of_both_sides_has_its_place_and_value(family: str, tied: bool, more: dict[str, Any], mesh: Mesh) -> None:
    """Logits equal too, so that each place holds what it means: q is not k."""
    model = small_config(**keys_of(family, tied, **more)).model
    theirs = their_model(family, tied, **({"attention_bias": True, "mlp_bias": True} if more else {}))
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert tensor_shapes(model) == {name: tuple(tensor.shape) for name, tensor in state.items()}

    stage, table = GPTStage(model, 0, model.num_layers, mesh.tp, torch.device("cpu")), places(model)
    assert {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()} == {n: p.shape for n, p in table.items()}
    for name, parameter in stage.named_parameters():
        place = table[name]
        values = state[place.tensor][place.region([0] * parameter.ndim, parameter.shape)]
        parameter.detach().to_local().copy_(values.T if place.transposed else values)
    tokens = torch.randint(model.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(stage(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "tied", "more"), CASES)
def test_our_config_comes_back(family: str, tied: bool, more: dict[str, Any]) -> None:
    model = small_config(**keys_of(family, tied, **more)).model
    values = from_hugging_face(to_hugging_face(model, None))
    assert {key: model.kv_heads if key == "num_kv_heads" else getattr(model, key) for key in values} == values
    sizes = {"vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size", "norm_eps", "tie_embeddings"}
    assert values.keys() >= sizes | {"position", "norm", "activation", "bias"}
    assert ("max_seq_len" in values, "rope_theta" in values) == (family == "gpt2", family == "llama")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_configs_of_transformers_are_understood(family: str) -> None:
    """As it writes them, and with what its earlier versions left out."""
    model = small_config(**keys_of(family, tied=True)).model
    config = their_model(family, tied=True).config.to_dict()
    expected = from_hugging_face(to_hugging_face(model, None))
    assert from_hugging_face(config) == expected
    if family == "gpt2":
        inner = {key: value for key, value in config.items() if key not in ("tie_word_embeddings", "layer_norm_epsilon")}
        assert from_hugging_face(inner | {"n_inner": None}) == expected | {"ffn_hidden_size": 4 * 32}
    else:
        old = {key: value for key, value in config.items() if key not in ("rope_parameters", "attention_bias", "mlp_bias", "head_dim")}
        assert from_hugging_face(old | {"rope_theta": 500.0, "rope_scaling": None}) == expected
        assert from_hugging_face(old)["rope_theta"] == 10000.0
        del old["num_key_value_heads"], old["tie_word_embeddings"]
        assert from_hugging_face(old) == expected | {"num_kv_heads": 4, "tie_embeddings": False, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"head_dim": 16}, "head_dim=16"),
        ("llama", {"attention_bias": True}, "attention_bias=True with mlp_bias=False"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0, "factor": 8.0}}, "rope_type=llama3"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_type=linear"),
        ("llama", {"model_type": "mistral"}, "model_type=mistral"),
    ],
)
def test_what_no_config_here_expresses(family: str, changes: dict[str, Any], said: str) -> None:
    config = to_hugging_face(small_config(**keys_of(family, tied=True)).model, None)
    from_hugging_face(config)
    with pytest.raises(UnsupportedConfig, match=said):
        from_hugging_face(config | changes)


@pytest.mark.parametrize(
    "changes", [{"norm": "rmsnorm"}, {"bias": False}, {"position": "rope"}, {"activation": "swiglu"}, {"num_kv_heads": 2}], ids=str
)
def test_a_mixed_model_is_of_neither_family(changes: dict[str, Any]) -> None:
    assert family_of(small_config(**keys_of("gpt2", tied=True)).model) == "gpt2"
    model = small_config(**keys_of("gpt2", tied=True, **changes)).model
    assert family_of(model) is None
    with pytest.raises(ValueError, match="neither"):
        places(model)
