"""The same weights in `transformers`' GPT-2 give the same logits."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.model.plain_gpt import copy_weights, plain_gpt
from tests.support import small_config
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
