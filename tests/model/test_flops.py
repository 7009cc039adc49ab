"""The formulas for parameters and FLOPs against built models."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.model.support import FAMILIES, gpt2, llama
from tests.support import small_config
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.flops import block_flops, flops_per_token, head_flops, num_parameters, stage_parameters
from tptrain.model.gpt import GPTStage
from tptrain.model.init import initialise

SIZES = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_num_parameters_of_every_size(mesh: Mesh, path: Path) -> None:
    shipped = ModelConfig(**yaml.safe_load(path.read_text()))
    layers = shipped.num_layers
    for tied, bias in ((True, True), (True, False), (False, True), (False, False)):
        model = replace(shipped, tie_embeddings=tied, bias=bias)
        if (tied, bias) != (shipped.tie_embeddings, shipped.bias):
            model = replace(model, num_layers=min(3, layers))  # the shipped one is built whole
        stage = GPTStage(model, 0, model.num_layers, mesh.tp, torch.device("meta"))
        assert num_parameters(model) == sum(parameter.numel() for parameter in stage.parameters()), (tied, bias)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt_125m", 125e6), ("gpt_350m", 350e6), ("gpt_760m", 760e6), ("gpt_1b", 1.3e9), ("gpt_3b", 2.7e9), ("gpt_7b", 6.7e9),
     ("gpt_13b", 13e9), ("gpt_30b", 30e9), ("gpt_70b", 71e9), ("gpt_175b", 175e9)],
)  # fmt: skip
def test_sizes_are_what_their_names_say(name: str, expected: float) -> None:
    """GPT-3's paper (Brown et al. 2020, table 2.1) rounds; 3 % leaves room for that and for the padded vocabulary."""
    path = next(path for path in SIZES if path.stem == name)
    assert num_parameters(ModelConfig(**yaml.safe_load(path.read_text()))) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("name", "expected"), [("llama_1b", 1.24e9), ("llama_8b", 8.03e9), ("llama_70b", 70.6e9)])
def test_llama_sizes_are_those_of_the_published_weights(name: str, expected: float) -> None:
    path = next(path for path in SIZES if path.stem == name)
    assert num_parameters(ModelConfig(**yaml.safe_load(path.read_text()))) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "changes", [{"num_kv_heads": 1}, {"num_kv_heads": 2, "bias": True}, {"num_kv_heads": 8, "tie_embeddings": True}], ids=str
)
def test_num_parameters_of_key_value_heads(mesh: Mesh, changes: dict[str, Any]) -> None:
    model = llama(**changes)
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, torch.device("meta"))
    assert num_parameters(model) == sum(parameter.numel() for parameter in stage.parameters())


@pytest.mark.parametrize("changes", [{"norm": "rmsnorm"}, {"position": "rope"}, {"activation": "swiglu"}], ids=str)
def test_num_parameters_of_each_choice_alone(mesh: Mesh, changes: dict[str, Any]) -> None:
    model = gpt2(**changes)
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, torch.device("meta"))
    assert num_parameters(model) == sum(parameter.numel() for parameter in stage.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bounds", [[0, 5], [0, 3, 5], [0, 1, 2, 5]], ids=str)
def test_parameters_of_each_stage(mesh: Mesh, family: str, tied: bool, bounds: list[int]) -> None:
    model = FAMILIES[family](num_layers=5, tie_embeddings=tied)
    for first, last in pairwise(bounds):
        stage = GPTStage(model, first, last, mesh.tp, torch.device("meta"))
        assert stage_parameters(model, first, last) == sum(parameter.numel() for parameter in stage.parameters())


def addmm_in_place(into: Any, a: tuple[int, int], b: tuple[int, int], **_: Any) -> int:
    """FLOPs of into += a @ b, by shapes; torch counts the other form of addmm alone."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize(("tied", "seq_len"), [(True, 16), (False, 16), (True, 5)])
def test_flops_are_those_that_torch_counts(mesh: Mesh, tied: bool, seq_len: int) -> None:
    model = small_config(model__tie_embeddings=tied, model__ffn_hidden_size=96, model__num_layers=3).model
    check_flops(mesh, model, seq_len)


@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 1), (False, 2), (False, 8)])
def test_flops_of_the_second_family(mesh: Mesh, tied: bool, kv_heads: int) -> None:
    check_flops(mesh, llama(tie_embeddings=tied, num_kv_heads=kv_heads, ffn_hidden_size=88, num_layers=3), 11)


def check_flops(mesh: Mesh, model: ModelConfig, seq_len: int) -> None:
    """Forward and backward, attention as two plain matrix products over the whole sequence. Equal, not just close."""
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, torch.device("cpu"))
    initialise(stage, model, 1)
    tokens = torch.randint(model.vocab_size, (3, seq_len + 1), generator=torch.Generator().manual_seed(1))
    in_place = {torch.ops.aten.addmm_: addmm_in_place}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        stage(tokens[:, :-1], tokens[:, 1:]).backward()
    assert counter.get_total_flops() == flops_per_token(model, seq_len) * 3 * seq_len


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_of_a_block_and_of_the_head(mesh: Mesh, family: str) -> None:
    """A stage in the middle has nothing but blocks; the last one also makes the logits."""
    model, tokens, rows = FAMILIES[family](num_layers=4), 7, 3
    x = torch.zeros(rows, tokens, model.hidden_size)
    for (first, last), expected in {
        (1, 2): block_flops(model, tokens),
        (1, 3): 2 * block_flops(model, tokens),
        (3, 4): block_flops(model, tokens) + head_flops(model),
    }.items():
        stage = GPTStage(model, first, last, mesh.tp, torch.device("cpu"))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            stage(x)
        assert counter.get_total_flops() == expected * rows * tokens
