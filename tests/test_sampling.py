"""Choosing tokens: the probabilities against direct formulas, the draws against the probabilities, rows against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.support import small_config
from tests.tensor_parallel.support import mesh_of, part
from tptrain.model.decode import Decoder
from tptrain.model.gpt import GPTStage
from tptrain.model.init import initialise
from tptrain.sampling import Chooser, Sampling, continuations, probabilities, whole_logits

LOGITS = torch.randn(3, 11, generator=torch.Generator().manual_seed(4)) * 2


def direct(row: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The same by the definition, in plain Python: sort, keep, divide."""
    weights = {token: math.exp(value / temperature) for token, value in enumerate(row)}
    best = sorted(weights, key=lambda token: -weights[token])[: top_k or len(row)]
    total, kept, reached = sum(weights[token] for token in best), [], 0.0
    for token in best:
        kept.append(token)
        reached += weights[token] / total
        if top_p is not None and reached >= top_p:
            break
    return [weights[token] / sum(weights[other] for other in kept) if token in kept else 0.0 for token in range(len(row))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 50])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.5, 0.9, 1.0])
def test_probabilities_are_those_of_the_definition(temperature: float, top_k: int | None, top_p: float | None) -> None:
    expected = [direct(row.tolist(), temperature, top_k, top_p) for row in LOGITS]
    assert_close(probabilities(LOGITS, Sampling(temperature, top_k, top_p)), torch.tensor(expected, dtype=torch.float64))


def test_top_p_reaches_exactly() -> None:
    """1/2 + 1/4 is 3/4: two tokens for 0.75, three for a little more. And of equal tokens the first ones stay."""
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]], dtype=torch.float64).log()
    assert (probabilities(logits, Sampling(1.0, None, 0.74)) > 0).tolist() == [[True, True, False, False]]
    assert (probabilities(logits, Sampling(1.0, None, 0.76)) > 0).tolist() == [[True, True, True, False]]
    assert (probabilities(torch.zeros(1, 5), Sampling(1.0, 2)) > 0).tolist() == [[True, True, False, False, False]]


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    assert_close(probabilities(LOGITS * 1e4, Sampling(1e-300)).argmax(-1), LOGITS.argmax(-1))
    assert torch.equal(Chooser(Sampling(1e-300), range(3)).choose(LOGITS), LOGITS.argmax(-1))
    assert torch.equal(Chooser(Sampling(0), range(3)).choose(LOGITS), LOGITS.argmax(-1))


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws: with 10 degrees of freedom it is below 30 in 999 of 1000 cases, and the seed is fixed."""
    sampling, count = Sampling(1.3, None, None, seed=5), 20_000
    chooser = Chooser(sampling, [0])
    expected = probabilities(LOGITS[:1], sampling)[0] * count
    seen = torch.bincount(torch.cat([chooser.choose(LOGITS[:1]) for _ in range(count)]), minlength=11)
    assert float(((seen - expected) ** 2 / expected).sum()) < 30

    narrow = Chooser(Sampling(1.3, 3, None, seed=5), [0])
    assert {int(narrow.choose(LOGITS[:1])) for _ in range(300)} == set(LOGITS[0].topk(3).indices.tolist())


def test_a_row_draws_the_same_in_any_batch() -> None:
    def draw(rows: list[int], seed: int = 1) -> list[list[int]]:
        chooser = Chooser(Sampling(2.0, seed=seed), rows)
        return torch.stack([chooser.choose(LOGITS[:1].expand(len(rows), -1)) for _ in range(40)], dim=1).tolist()

    together = draw([0, 1, 2])
    assert draw([2, 0]) == [together[2], together[0]]
    assert len({tuple(row) for row in together}) == 3
    assert draw([0], seed=2) != draw([0])


def test_over_ranks() -> None:
    """Logits of an uneven vocabulary, whole on every rank; and sampled tokens are the same on every rank and under every tp."""
    alone = run_ranks(1, sampled_tokens)[0]
    for world in (2, 4):
        assert run_ranks(world, sampled_tokens) == [alone] * world
    assert len({tuple(row) for row in zip(*alone, strict=True)}) == 2


def sampled_tokens(rank: int) -> list[list[int]]:
    mesh = mesh_of(tp=torch.distributed.get_world_size())
    whole = torch.randn(3, 13, generator=torch.Generator().manual_seed(6))
    assert torch.equal(whole_logits(part(whole, -1, mesh.tp_size, mesh.tp_rank), 13, mesh.tp_group), whole)
    model = small_config(model__num_layers=2).model
    stage = GPTStage(model, 0, 2, mesh.tp, torch.device("cpu"))
    initialise(stage, model, seed=3)
    # Another rank's seed must not matter: the first rank of the group chooses.
    chooser = Chooser(Sampling(1.0, 50, 0.95, seed=8 + rank), [0, 1])
    return list(continuations(Decoder(stage, 2, 13), [[1, 2, 3], [4]], 10, chooser))


def test_the_loop_ends_with_the_last_row(mesh_of_one) -> None:
    """Rows end one after the other; the end token itself is handed out; nobody asks the model for tokens that nobody wants."""
    model = small_config(model__num_layers=1).model
    stage = GPTStage(model, 0, 1, mesh_of_one.tp, torch.device("cpu"))
    initialise(stage, model, seed=3)

    class Script(Chooser):
        """Chooses what the test says."""

        def __init__(self, steps: list[list[int]]) -> None:
            self.steps = iter(steps)

        def choose(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.tensor(next(self.steps))

    def run(steps: list[list[int]], count: int = 9, **more) -> tuple[list[list[int]], int]:
        decoder = Decoder(stage, 2, 12)
        return list(continuations(decoder, [[1], [2]], count, Script(steps), **more)), decoder.cache.length

    steps = [[5, 6], [7, 0], [0, 3], [4, 4]]
    assert run(steps, end=0) == (steps[:3], 3)
    assert run(steps, count=4) == (steps, 4)
    asked = iter([True, True, False])
    assert run(steps, wanted=lambda: next(asked)) == (steps[:2], 3)


@pytest.fixture
def mesh_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield mesh_of()
    torch.distributed.destroy_process_group()
