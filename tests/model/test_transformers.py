"""The same weights in `transformers`' GPT-2 and Llama give the same logits, and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.model.plain_gpt import copy_weights, plain_gpt
from tests.model.support import batch, llama, stage_like
from tests.support import small_config
from tests.tensor_parallel.support import whole_gradient
from tptrain.mesh import Mesh
from tptrain.model.gpt import GPTStage

CONV1D = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}  # weights [in, out]
NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}


def hugging_face_weights(ours: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    theirs = {"wte.weight": ours["embedding.weight"], "wpe.weight": ours["positions.weight"]}
    for kind in ("weight", "bias"):
        theirs[f"ln_f.{kind}"] = ours[f"final_norm.{kind}"]
        for i in range(layers):
            fused = torch.cat([ours[f"layers.{i}.attention.{letter}.{kind}"] for letter in "qkv"])
            theirs[f"h.{i}.attn.c_attn.{kind}"] = fused.T if kind == "weight" else fused
            for name, their_name in CONV1D.items():
                value = ours[f"layers.{i}.{name}.{kind}"]
                theirs[f"h.{i}.{their_name}.{kind}"] = value.T if kind == "weight" else value
            for name, their_name in NORMS.items():
                theirs[f"h.{i}.{their_name}.{kind}"] = ours[f"layers.{i}.{name}.{kind}"]
    head = ours.get("head.weight", ours["embedding.weight"])
    return {f"transformer.{name}": value for name, value in theirs.items()} | {"lm_head.weight": head}


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_of_transformers(mesh: Mesh, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_config(model__tie_embeddings=tied, model__num_layers=3).model
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, torch.device("cpu"))
    copy_weights(plain_gpt(model), stage)
    config = transformers.GPT2Config(
        vocab_size=model.vocab_size, n_positions=model.max_seq_len, n_embd=model.hidden_size, n_layer=model.num_layers,
        n_head=model.num_heads, n_inner=model.ffn_hidden_size, activation_function="gelu_new", layer_norm_epsilon=model.norm_eps,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    other = transformers.GPT2LMHeadModel(config).eval()
    weights = {name: parameter.detach().to_local().clone() for name, parameter in stage.named_parameters()}
    missing, unexpected = other.load_state_dict(hugging_face_weights(weights, model.num_layers), strict=False)
    assert not unexpected
    assert all(name.endswith((".attn.bias", ".attn.masked_bias")) for name in missing), "only masks may be left as they are"

    tokens = torch.randint(model.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(stage(tokens), other(tokens).logits, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in stage.parameters())


LLAMA_NAMES = {
    "attention_norm": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip


def llama_name(name: str) -> str:
    """What a weight of GPTStage is called in LlamaForCausalLM."""
    if name == "head.weight":
        return "lm_head.weight"
    if not name.startswith("layers."):
        return {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LLAMA_NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 2), (False, 1), (False, 8)])
def test_llama_of_transformers(mesh: Mesh, tied: bool, kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = llama(tie_embeddings=tied, num_kv_heads=kv_heads, num_layers=3, rope_theta=500.0)
    stage = stage_like(plain_gpt(model), model, mesh)
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads, num_key_value_heads=kv_heads,
        max_position_embeddings=model.max_seq_len, rms_norm_eps=model.norm_eps, tie_word_embeddings=tied, hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    other = transformers.LlamaForCausalLM(config).eval()
    weights = {llama_name(name): parameter.detach().to_local().clone() for name, parameter in stage.named_parameters()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else []), "which is the embedding"
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in stage.parameters())

    inputs, targets = batch(model)
    logits = other(inputs).logits
    assert_close(stage(inputs), logits, rtol=1e-4, atol=1e-4)
    (stage(inputs, targets) / 34).backward()
    (torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 34).backward()
    for name, parameter in stage.named_parameters():
        theirs = other.get_parameter(llama_name(name)).grad
        assert_close(whole_gradient(parameter), theirs, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
