"""Memory by formula against what ranks hold: the peak of tracked tensors, from the building of a trainer to the end of its second
step, so that the optimizer's state is in."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.plan.memory_cases import CASES, GPT, LLAMA, layout
from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tptrain.data.dataset import Data
from tptrain.dry_run.tracked import TrackedBytes
from tptrain.mesh import build_mesh
from tptrain.plan.activations import Sizes, block_memory
from tptrain.plan.memory import GPU_MARGIN, rank_memory
from tptrain.plan.peak import enough_micro_batches
from tptrain.plan.pipeline import describe
from tptrain.trainer import Trainer

LIMIT = 0.05
"""Of the measured peak, by which a prediction may miss it."""
NAMED = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")


def measure(rank: int, world: int) -> dict[str, tuple[int, int]]:
    """On each rank: its pipeline rank and its peak of bytes, by case."""
    found = {}
    for name, changes in CASES[world].items():
        config = small_config(**changes)
        tokens = skewed_tokens(20_000, config.model.vocab_size)
        mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
        with TrackedBytes() as tracked:
            trainer = Trainer(config, mesh, Data.of_tokens(config, tokens, end_of_document=3))
            trainer.step()
            trainer.step()
        trainer.close()
        found[name] = (mesh.pp_rank, tracked.peak_bytes)
    return found


@cache
def measured(world: int) -> list[dict[str, tuple[int, int]]]:
    """By rank."""
    return run_ranks(world, measure, world)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, cases in CASES.items() for name in cases])
def test_predicted_as_measured(world: int, name: str) -> None:
    """Of each pipeline rank, the largest of its tp and dp ranks."""
    config = small_config(**CASES[world][name])
    for predicted in rank_memory(config, describe(config)):
        peak = max(bytes_ for pp_rank, bytes_ in (rank[name] for rank in measured(world)) if pp_rank == predicted.pp_rank)
        print(f"pipeline rank {predicted.pp_rank}: predicted {predicted.total:,} measured {peak:,} {predicted.total / peak - 1:+.2%}")
        assert abs(predicted.total / peak - 1) < LIMIT


def test_the_cases_are_of_every_kind() -> None:
    configs = [small_config(**changes) for cases in CASES.values() for changes in cases.values()]
    assert len(configs) >= 24
    pipelines = {config.parallel.schedule for config in configs if config.parallel.pp > 1}
    assert pipelines == set(NAMED)
    assert {config.parallel.recompute for config in configs} == {"none", "selective", "full"}


# ---- what a search asks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [name for name in NAMED if name != "gpipe"])
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_memory_does_not_depend_on_how_many_micro_batches_there_are(schedule: str, pp: int) -> None:
    """From some number on, but for buffers and the tokens themselves."""

    def peaks(micro_batches: int) -> list[int]:
        config = small_config(**LLAMA | {"model__num_layers": 16} | layout(pp=pp, schedule=schedule, micro_batches=micro_batches))
        return [rank.total - rank.buffers for rank in rank_memory(config, describe(config))]

    for many in (8 * pp, 8 * pp + 1, 10 * pp - 1):
        enough = enough_micro_batches(schedule, pp, many)
        assert enough < many
        assert peaks(enough) == pytest.approx(peaks(many), rel=0.01)


def test_with_gpipe_each_micro_batch_adds_the_same() -> None:
    def peaks(micro_batches: int) -> list[int]:
        config = small_config(**GPT | layout(pp=4, schedule="gpipe", micro_batches=micro_batches))
        return [rank.activations for rank in rank_memory(config, describe(config))]

    assert enough_micro_batches("gpipe", 4, 100) == 100
    one, two, three = peaks(8), peaks(9), peaks(10)
    assert [b - a for a, b in zip(one, two, strict=True)] == [c - b for b, c in zip(two, three, strict=True)]
    assert all(b > a for a, b in zip(one, two, strict=True))


# ---- what is stated -------------------------------------------------------------------------------------------


def test_a_gpu_keeps_a_stated_share_more() -> None:
    config = small_config(**GPT, hardware__device="cuda")
    (memory,) = rank_memory(config, describe(config))
    assert memory.margin == pytest.approx(GPU_MARGIN * (memory.total - memory.margin), rel=1e-6)
    config = small_config(**GPT)
    (memory,) = rank_memory(config, describe(config))
    assert memory.margin == 0


def test_weights_and_their_states_by_hand() -> None:
    """One process, AdamW: 4 bytes a parameter, twice that of state, 4 of gradient; bf16 copies 2."""
    config = small_config(**GPT, train__precision="bf16")
    (memory,) = rank_memory(config, describe(config))
    h, ffn, vocab, layers, positions = 128, 512, 2048, 4, 128
    block = 4 * h * h + 4 * h + 2 * h * ffn + ffn + h + 4 * h
    parameters = layers * block + vocab * h + positions * h + 2 * h
    assert (memory.parameters, memory.optimizer, memory.copies) == (4 * parameters, 8 * parameters, 2 * parameters)
    assert memory.gradients in (0, 4 * parameters)


def test_sharding_over_dp_divides_what_is_kept() -> None:
    whole = small_config(**GPT)
    halves = small_config(**GPT, parallel__dp=2)
    (one,), (two,) = (rank_memory(config, describe(config)) for config in (whole, halves))
    assert (two.parameters, two.optimizer) == (one.parameters // 2, one.optimizer // 2)
    assert two.gathered == 2 * one.parameters, "weights and gradients, whole in fp32"


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_block_keeps_what_the_literature_counts(tp: int, sequence: bool) -> None:
    """Korthikanti et al. 2022, table 2, in bytes at 2 a number: s b h (10 + 24/t), or with sequence parallelism 34/t, without the matrices
    of attention, which is fused; 2 s b h of it are dropout's masks, of which there are none. Beside: two numbers a norm, one a head.
    """
    config = small_config(**GPT, train__precision="bf16", hardware__device="cuda", **layout(tp=tp, sequence_parallel=sequence))
    tokens, hidden = 2 * 128, 128
    numbers = 4 * 4 * tokens // (tp if sequence else 1) + 4 * tokens * 4 // tp
    assert block_memory(config, Sizes.of(config)).kept == tokens * hidden * (32 // tp if sequence else 8 + 24 // tp) + numbers
    config.parallel.recompute = "full"
    assert block_memory(config, Sizes.of(config)).kept == 2 * tokens * hidden // (tp if sequence else 1)
