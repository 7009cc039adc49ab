"""The Decoder against the stage's own forward on the growing sequence, for both families, split and whole, alone and in batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.support import small_config
from tests.tensor_parallel.support import mesh_of
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.decode import Decoder, left_padded
from tptrain.model.gpt import Execution, GPTStage
from tptrain.model.init import initialise
from tptrain.sampling import Chooser, Sampling, continuations, whole_logits
from tptrain.tensor_parallel.parameter import compute_in, drop_copies

CPU = torch.device("cpu")
PROMPTS = [[3, 250, 17, 5, 90], [77], [8, 8, 200]]
NEW = 7
GPT = small_config(model__num_layers=2, model__init_std=0.4).model
LLAMA = replace(GPT, position="rope", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False, num_kv_heads=2)
MODELS = {
    "gpt": GPT,
    "untied, no bias": replace(GPT, tie_embeddings=False, bias=False),
    "llama": LLAMA,
    "one kv head": replace(LLAMA, num_kv_heads=1, bias=True, norm="layernorm"),
}


def stage_of(model: ModelConfig, mesh: Mesh, **execution: bool) -> GPTStage:
    """A stage with every layer and values that no layout changes; norms and biases are random too."""
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, CPU, Execution(**execution))
    initialise(stage, model, seed=1)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(stage.named_parameters()):
            if "norm" in name:
                parameter.to_local().add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return stage


@torch.no_grad()
def by_whole_forward(stage: GPTStage, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache: the whole sequence again for each."""
    tokens = list(prompt)
    for _ in range(count):
        logits = whole_logits(stage(torch.tensor([tokens]))[:, -1], stage.model.vocab_size, stage.group)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def by_decoder(stage: GPTStage, prompts: list[list[int]], count: int = NEW) -> list[list[int]]:
    """Greedy tokens, row by row."""
    decoder = Decoder(stage, len(prompts), max(map(len, prompts)) + count)
    chooser = Chooser(Sampling(temperature=0), range(len(prompts)))
    steps = list(continuations(decoder, prompts, count, chooser))
    return [list(row) for row in zip(*steps, strict=True)]


def test_greedy_tokens_are_those_of_the_whole_forward_under_every_tp() -> None:
    alone = run_ranks(1, check_and_generate)[0]
    for world in (2, 4):
        assert run_ranks(world, check_and_generate) == [alone] * world
    for name, rows in alone.items():
        assert len({tuple(row) for row in rows}) == len(PROMPTS), f"{name}: the rows must differ to tell anything"
        assert max(len(set(row)) for row in rows) > 2, f"{name}: and so must the tokens"


def check_and_generate(rank: int) -> dict[str, list[list[int]]]:
    mesh = mesh_of(tp=torch.distributed.get_world_size())
    rows = {}
    for name, model in MODELS.items():
        stage = stage_of(model, mesh)
        rows[name] = by_decoder(stage, PROMPTS)
        if mesh.tp_size == 1:
            assert rows[name] == [by_whole_forward(stage, prompt, NEW) for prompt in PROMPTS], name
            assert rows[name] == [by_decoder(stage, [prompt])[0] for prompt in PROMPTS], f"{name}, alone"
        check_cache_is_split(stage, mesh)
    return rows


def check_cache_is_split(stage: GPTStage, mesh: Mesh) -> None:
    model = stage.model
    whole = model.num_layers * 2 * 3 * model.kv_heads * 16 * model.head_size * 4  # layers, k and v, rows, heads, tokens, width, bytes
    assert Decoder(stage, 3, 16).cache.bytes == whole // min(mesh.tp_size, model.kv_heads)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_whole_forward(mesh: Mesh, name: str) -> None:
    """Of a prompt read at once, read in two pieces, and read token by token; with padding and without."""
    stage = stage_of(MODELS[name], mesh)
    rows = torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = stage(rows)
    for pieces in ([12], [7, 5], [5, 1, 1, 1, 1, 1, 1, 1]):
        decoder, stop = Decoder(stage, 3, 12), 0
        for piece in pieces:
            logits = decoder(rows[:, stop : stop + piece])
            stop += piece
            assert_close(logits, expected[:, stop - 1], rtol=1e-4, atol=1e-4)
            assert not logits.requires_grad
    padding = torch.tensor([3, 0, 5])
    padded = rows.clone()
    padded[0, :3], padded[2, :5] = 99, 0
    with torch.no_grad():
        alone = torch.stack([stage(rows[i : i + 1, skip:])[0, -1] for i, skip in enumerate(padding.tolist())])
    decoder = Decoder(stage, 3, 12)
    for first, stop in ((0, 8), (8, 10), (10, 11), (11, 12)):
        logits = decoder(padded[:, first:stop], padding if first == 0 else None)
    assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_steps_reuse_their_memory(mesh: Mesh) -> None:
    decoder = Decoder(stage_of(LLAMA, mesh), 2, 16)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    pointers = {(decoder(part).data_ptr(), decoder.cache.values.data_ptr()) for part in (tokens, *[tokens[:, :1]] * 4)}
    assert len(pointers) == 1
    buffers = {name: buffer.data_ptr() for name, buffer in decoder.run._buffers.items()}
    assert len(set(buffers.values())) == len(buffers) == 9, "q, k, v, out; gate, up, down; the residual and the logits"
    decoder(tokens[:, :1])
    assert {name: buffer.data_ptr() for name, buffer in decoder.run._buffers.items()} == buffers


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_bf16(mesh: Mesh, name: str) -> None:
    """Close to the stage's own bf16 forward; the cache is bf16; and weights that are bf16 themselves give the same bits."""
    stage = stage_of(replace(MODELS[name], init_std=0.1), mesh)
    compute_in(stage, torch.bfloat16)
    decoder = Decoder(stage, 3, 16)
    assert decoder.cache.values.dtype == torch.bfloat16
    tokens, padding = left_padded(PROMPTS)
    logits = decoder(tokens, padding).clone()
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        expected = torch.stack([stage(torch.tensor([prompt]))[0, -1] for prompt in PROMPTS])
    assert_close(logits, expected, rtol=0.05, atol=0.05)
    stage.to(torch.bfloat16)
    drop_copies(stage)
    assert stage.embedding.values("weight").data_ptr() == stage.embedding.weight.to_local().data_ptr(), "no copy"
    assert torch.equal(Decoder(stage, 3, 16)(tokens, padding), logits)


def test_what_a_decoder_refuses(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=r"reads tokens \[b, t\], the others activations \[b, t, h\]: got \[1, 2\]"):
        Decoder(GPTStage(GPT, 1, 2, mesh.tp, CPU), 1, 4)(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="the first stage reads tokens"):
        Decoder(GPTStage(GPT, 0, 1, mesh.tp, CPU), 1, 4)(torch.zeros(1, 2, GPT.hidden_size))
    with pytest.raises(ValueError, match="17 tokens are more than max_seq_len=16"):
        Decoder(stage_of(GPT, mesh), 1, 17)
    with pytest.raises(ValueError, match="sequence_parallel"):
        Decoder(stage_of(GPT, mesh, sequence_parallel=True), 1, 4)(torch.tensor([[1]]))
    decoder = Decoder(stage_of(GPT, mesh), 1, 4)
    decoder(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="first tokens"):
        decoder(torch.tensor([[1]]), torch.tensor([0]))
