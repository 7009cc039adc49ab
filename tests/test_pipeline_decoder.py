"""The PipelineDecoder against the whole model's own forward on the growing sequence, without cache, stages or batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.support import small_config
from tests.tensor_parallel.support import fill, mesh_of, part, random
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.decode import Decoder, left_padded
from tptrain.model.gpt import GPTStage
from tptrain.model.init import initialise
from tptrain.pipeline.partition import even_partition
from tptrain.pipeline_decoder import PipelineDecoder
from tptrain.sampling import Chooser, Sampling, continuations
from tptrain.tensor_parallel.parameter import compute_in

CPU = torch.device("cpu")
LAYERS, NEW = 4, 6
PROMPTS = [[3, 250, 17, 5, 90], [77], [8, 8, 200], [31, 7, 7, 100, 12, 9], [5, 6]]
GPT = small_config(model__num_layers=LAYERS, model__init_std=0.4).model
LLAMA = replace(GPT, position="rope", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False, num_kv_heads=2)
MODELS = {
    "gpt": GPT,
    "untied gpt": replace(GPT, tie_embeddings=False),
    "llama": LLAMA,
    "tied llama, one kv head": replace(LLAMA, tie_embeddings=True, num_kv_heads=1),
}
LAYOUTS = {"pp1": {"pp": 1}, "pp2": {"pp": 2}, "pp3": {"pp": 3}, "pp4": {"pp": 4}, "tp2_pp2": {"tp": 2, "pp": 2}}
SAMPLINGS = {"greedy": Sampling(0), "sampled": Sampling(1.5, 40, 0.95, seed=5)}
BATCHES = (1, 2, 3, 5)
"""Rows: fewer than stages, as many, more, and numbers that the micro-batches share unevenly."""


def whole_model(model: ModelConfig, mesh_of_one_tp: Mesh) -> GPTStage:
    """All layers, on every rank alike; norms and biases are random too."""
    stage = GPTStage(model, 0, model.num_layers, mesh_of_one_tp.tp, CPU)
    initialise(stage, model, seed=1)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(stage.named_parameters()):
            if "norm" in name or "bias" in name:
                parameter.to_local().add_(0.3 * random(*parameter.shape, seed=number))
    return stage


def stage_of(whole: GPTStage, mesh: Mesh) -> GPTStage:
    """This rank's part of the whole model."""
    stage = GPTStage(whole.model, *even_partition(whole.model.num_layers, mesh.pp_size)[mesh.pp_rank], mesh.tp, CPU)
    for name, parameter in stage.named_parameters():
        fill(parameter, whole.get_parameter(name).to_local())
    return stage


@torch.no_grad()
def by_whole_forward(whole: GPTStage, row: int, sampling: Sampling) -> list[int]:
    """A prompt's tokens, alone and without a cache: the whole sequence again for each."""
    tokens, chooser = list(PROMPTS[row]), Chooser(sampling, [row])
    for _ in range(NEW):
        tokens.append(int(chooser.choose(whole(torch.tensor([tokens]))[:, -1])))
    return tokens[len(PROMPTS[row]) :]


class Silent(Chooser):
    """Of a rank that does not choose."""

    def __init__(self) -> None:
        pass

    def choose(self, logits: Tensor) -> Tensor:
        raise AssertionError("only the last stage's first rank chooses")


def chooses(mesh: Mesh) -> bool:
    return mesh.pp_rank == mesh.pp_size - 1 and mesh.tp_rank == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pipeline_decoder(layout: str) -> None:
    sizes = LAYOUTS[layout]
    world = sizes.get("tp", 1) * sizes["pp"]
    results = run_ranks(world, check_all, layout)
    assert results == [results[0]] * world, "all ranks get the same tokens"
    for name, rows in results[0].items():
        assert len({tuple(row) for row in rows}) == len(PROMPTS), f"{name}: the rows must differ to tell anything"
        assert max(len(set(row)) for row in rows) > 2, f"{name}: and so must the tokens"


def check_all(rank: int, layout: str) -> dict[str, list[list[int]]]:
    mesh, alone = mesh_of(**LAYOUTS[layout]), mesh_of(dp=torch.distributed.get_world_size())
    found = {}
    for name, model in MODELS.items():
        whole = whole_model(model, alone)
        stage = stage_of(whole, mesh)
        for kind in SAMPLINGS:
            found[f"{layout}, {name}, {kind}"] = check_tokens(whole, stage, mesh, kind, f"{layout}, {name}, {kind}")
        for rows in BATCHES:
            check_logits_and_caches(whole, stage, mesh, rows)
        check_bf16(whole, stage, mesh)
    check_end_and_wanted(stage, mesh)
    if mesh.pp_size > 1:
        with pytest.raises(ValueError, match="serves one batch, and dp="):
            PipelineDecoder(stage, alone, 1, 4)
    return found


def check_tokens(whole: GPTStage, stage: GPTStage, mesh: Mesh, kind: str, where: str) -> list[list[int]]:
    sampling = SAMPLINGS[kind]
    expected = [by_whole_forward(whole, row, sampling) for row in range(len(PROMPTS))]
    for rows in BATCHES:
        prompts = PROMPTS[:rows]
        decoder = PipelineDecoder(stage, mesh, rows, max(map(len, prompts)) + NEW)
        assert len(decoder.decoders) == min(mesh.pp_size, rows)
        chooser = Chooser(sampling, range(rows)) if chooses(mesh) else Silent()
        steps = list(continuations(decoder, prompts, NEW, chooser))
        found = [list(row) for row in zip(*steps, strict=True)]
        assert found == expected[:rows], f"{where}, {rows} rows"
    return found


def check_logits_and_caches(whole: GPTStage, stage: GPTStage, mesh: Mesh, rows: int) -> None:
    """Padded prompts in two pieces, then single tokens: logits are those of each row alone, and each stage's keys and values are those
    that a whole model has of its layers."""
    tokens, padding = left_padded(PROMPTS[-rows:])
    longest = tokens.shape[1]
    tokens = torch.cat([tokens, torch.randint(257, (rows, 3), generator=torch.Generator().manual_seed(2))], dim=1)
    decoder, twin = PipelineDecoder(stage, mesh, rows, tokens.shape[1]), Decoder(whole, rows, tokens.shape[1])
    first_piece = max(1, longest - 1)
    bounds = [0, first_piece, *range(first_piece + 1, tokens.shape[1] + 1)]
    for first, stop in pairwise(bounds):
        more = (padding,) if first == 0 else ()
        logits = decoder(tokens[:, first:stop], *more)
        twin(tokens[:, first:stop], *more)
        assert (logits is not None) == stage.is_last
        if logits is not None:
            with torch.no_grad():
                expected = torch.cat([whole(tokens[i : i + 1, skip:stop])[:, -1] for i, skip in enumerate(padding.tolist()) if skip < stop])
            seen = logits[padding < stop]
            assert_close(seen, part(expected, -1, mesh.tp_size, mesh.tp_rank), rtol=1e-4, atol=1e-4)
    first_layer, last_layer = even_partition(LAYERS, mesh.pp_size)[mesh.pp_rank]
    heads_here = max(1, whole.model.kv_heads // mesh.tp_size)
    first_head = mesh.tp_rank * whole.model.kv_heads // mesh.tp_size
    for (first, stop), one in zip(decoder.bounds, decoder.decoders, strict=True):
        theirs = twin.cache.values[first_layer:last_layer, :, first:stop, first_head : first_head + heads_here]
        ours = one.cache.values[:, :, first - stop :]
        assert ours.shape == theirs.shape
        for row, skip in enumerate(padding[first:stop].tolist()):
            assert_close(ours[:, :, row, :, skip:], theirs[:, :, row, :, skip:], rtol=1e-4, atol=1e-4)
    held = sum(one.cache.bytes for one in decoder.decoders)
    if rows % len(decoder.decoders) == 0 and LAYERS % mesh.pp_size == 0:
        assert held == twin.cache.bytes // mesh.pp_size // min(mesh.tp_size, whole.model.kv_heads)


def check_bf16(whole: GPTStage, stage: GPTStage, mesh: Mesh) -> None:
    """Activations travel, and keys and values stay, in the dtype that is computed in."""
    for model in (whole, stage):
        compute_in(model, torch.bfloat16)
    decoder = PipelineDecoder(stage, mesh, 3, 8)
    assert {one.cache.values.dtype for one in decoder.decoders} == {torch.bfloat16}
    tokens, padding = left_padded(PROMPTS[:3])
    logits = decoder(tokens, padding)
    if logits is not None:
        assert logits.dtype == torch.bfloat16
        expected = part(Decoder(whole, 3, 8)(tokens, padding), -1, mesh.tp_size, mesh.tp_rank)
        assert float((logits - expected).float().norm() / expected.float().norm()) < 0.05
    for model in (whole, stage):
        compute_in(model, torch.float32)


def check_end_and_wanted(stage: GPTStage, mesh: Mesh) -> None:
    """The loop ends alike on all ranks, with the last row that ends, or when rank 0 alone says so; and nothing is left under way."""

    class Script(Silent):
        def __init__(self, steps: list[list[int]]) -> None:
            self.steps = iter(steps)

        def choose(self, logits: Tensor) -> Tensor:
            return torch.tensor(next(self.steps))

    def run(answers: list[bool] | None, end: int | None) -> tuple[list[list[int]], int]:
        asked = iter(answers or [True] * 9)

        def wanted() -> bool:
            assert mesh.world.rank() == 0, "rank 0 writes the text, and it alone knows who reads"
            return next(asked)

        decoder = PipelineDecoder(stage, mesh, 2, 12)
        chooser = Script(steps) if chooses(mesh) else Silent()
        found = list(continuations(decoder, [[1], [2]], len(steps), chooser, end, wanted))
        lengths = {one.cache.length for one in decoder.decoders}
        assert len(lengths) == 1
        return found, lengths.pop()

    steps = [[5, 6], [7, 0], [0, 3], [4, 4]]
    assert run(None, end=0) == (steps[:3], 3)
    assert run(None, end=None) == (steps, 4)
    assert run([True, True, False], end=0) == (steps[:2], 3)
    assert run([False], end=0) == ([], 1)
