"""Bytes and calls of a training step: the plan's equal those that a hook on the process groups counts, exactly.

Every layout of the equality matrix and a choice of the schedules', each of their ranks for itself, on torch's fake process group; and a few
of them on ranks that gloo joins, which call the same.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.support import skewed_tokens
from tests.test_equality import APART, CASES, LLAMA_SGD, MQA_SGD, SHALLOW_SGD, SP, TIED_SGD, Case
from tests.test_pipeline_equality import CASES as SCHEDULE_CASES
from tptrain.config import Config
from tptrain.data.dataset import Data
from tptrain.dry_run.counter import CallCounter, group_names
from tptrain.dry_run.trace import planned_totals
from tptrain.mesh import build_mesh
from tptrain.plan.communication import Totals
from tptrain.plan.pipeline import describe
from tptrain.trainer import Trainer

pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases

UNEVEN = {"model__vocab_size": 101, "model__hidden_size": 36, "model__ffn_hidden_size": 50, "train__global_batch_size": 24}
MORE = [  # what the equality tests leave out: bf16, dp that does not divide, both copies of a tied embedding beside dp
    Case({"dp": 2}, SHALLOW_SGD | {"train__precision": "bf16"}), Case({"dp": 3}, UNEVEN | SHALLOW_SGD | {"model__vocab_size": 101}),
    Case({"tp": 2, "dp": 2} | SP, LLAMA_SGD | {"train__precision": "bf16", "train__label_smoothing": 0.1}),
    Case({"tp": 2, "pp": 2, "dp": 2, "schedule": "zb_v", "stages_per_rank": 2} | SP, TIED_SGD | {"train__precision": "bf16"}),
    Case({"tp": 2, "recompute": "full"} | SP, SHALLOW_SGD | {"model__dropout": 0.1, "train__loss_chunk_tokens": 7}),
    # where fully_shard would guess wrong what backward needs next, and gather a block twice
    Case({"pp": 8, "dp": 2, "schedule": "interleaved", "stages_per_rank": 2, "micro_batch_size": 1},
         {"model__num_layers": 32, "train__global_batch_size": 32}),
]  # fmt: skip
ALL = [*CASES, *SCHEDULE_CASES[::3], *MORE]
RANKS_OF = {8: (0, 3, 5, 6), 16: (6, 8)}
"""Which ranks of so many; else all."""


def of_case(case: Case, rank: int) -> tuple[Config, Totals]:
    """What a rank of a case calls in a step. Its process has the group of all ranks."""
    config = case.config()
    mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
    tokens = skewed_tokens(2000, config.model.vocab_size)
    trainer = Trainer(config, mesh, Data.of_tokens(config, tokens[:1500], tokens[1500:], end_of_document=0))
    with CallCounter(group_names(mesh)) as counter:
        trainer.step()
    trainer.close()
    return config, counter.totals


def count_on_fake(world: int, rank: int, indices: list[int]) -> dict[int, Totals]:
    """The calls of one rank in each of the cases, with nobody at the other end."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    return {index: of_case(ALL[index], rank)[1] for index in indices}


@pytest.fixture(scope="module")
def counted() -> dict[int, dict[int, Totals]]:
    """By case and rank. A fake group stays for ever, so that each rank has a process of its own."""
    found: dict[int, dict[int, Totals]] = {index: {} for index in range(len(ALL))}
    with ProcessPoolExecutor(2, ranks._context, max_tasks_per_child=1) as pool:
        running = {}
        for world in sorted({case.world for case in ALL}, reverse=True):
            of_world = [index for index, case in enumerate(ALL) if case.world == world]
            for rank in RANKS_OF.get(world, range(world)):
                running[rank, pool.submit(count_on_fake, world, rank, of_world)] = rank
        for (rank, future), _ in running.items():
            for index, totals in future.result(timeout=600).items():
                found[index][rank] = totals
    return found


def planned(config: Config, rank: int) -> Totals:
    """The plan's, for a rank of the job."""
    tp, dp = config.parallel.tp, int(config.parallel.dp)
    return planned_totals(config, describe(config), rank // (tp * dp), rank // tp % dp, rank % tp)


@pytest.mark.parametrize("index", range(len(ALL)), ids=lambda index: f"{index}-{ALL[index].name}")
def test_the_plan_is_what_is_called(index: int, counted: dict[int, dict[int, Totals]]) -> None:
    config = ALL[index].config()
    assert len(counted[index]) == len(RANKS_OF.get(config.processes, range(config.processes)))
    for rank, totals in counted[index].items():
        assert totals == planned(config, rank), f"rank {rank}"
        assert config.processes == 1 or totals[("world", "all_reduce")] == (1, 32), "the counter must be at work"


# ---- the same on real ranks ----------------------------------------------------------------------------------


REAL = {
    2: [Case({"tp": 2} | SP, LLAMA_SGD), Case({"dp": 2}, SHALLOW_SGD), Case({"pp": 2, "schedule": "zb_v", "stages_per_rank": 2}, TIED_SGD)],
    4: [Case({"tp": 2, "dp": 2} | SP, MQA_SGD), Case({"tp": 2, "pp": 2, "recompute": "full"} | SP, APART | SHALLOW_SGD),
        Case({"pp": 2, "dp": 2}, SHALLOW_SGD)],
}  # fmt: skip


def count_on_gloo(rank: int, cases: list[Case]) -> list[Totals]:
    return [of_case(case, rank)[1] for case in cases]


@pytest.mark.parametrize("world", REAL)
def test_real_ranks_call_the_same(world: int) -> None:
    results = ranks.run_ranks(world, count_on_gloo, REAL[world])
    for rank, totals in enumerate(results):
        assert totals == [planned(case.config(), rank) for case in REAL[world]], f"rank {rank}"


def call_each(rank: int) -> dict[str, Any]:
    """One call of each kind, of known sizes."""
    world = dist.group.WORLD
    with CallCounter({world.group_name: "all"}) as counter:
        dist.all_reduce(torch.zeros(10), group=world)
        dist.all_gather_into_tensor(torch.zeros(6, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16), group=world)
        dist.reduce_scatter_tensor(torch.zeros(5), torch.zeros(10), group=world)
        dist.broadcast(torch.zeros(7, dtype=torch.int64), 0, group=world)
        work = (dist.isend if rank == 0 else dist.irecv)(torch.zeros(2, 3), 1 - rank, group=world)
        work.wait()
        x = torch.ones(3, requires_grad=True)
        _ReducedBackward.apply(x).sum().backward()
    return counter.totals


class _ReducedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        total = grad.contiguous()
        dist.all_reduce(total, group=dist.group.WORLD)
        return total


def test_the_counter_sees_every_kind_of_call_and_backward() -> None:
    for rank, totals in enumerate(ranks.run_ranks(2, call_each)):
        assert totals == {
            ("all", "all_reduce"): (2, 40 + 12), ("all", "all_gather"): (1, 12), ("all", "reduce_scatter"): (1, 40),
            ("all", "broadcast"): (1, 56), ("all", "receive" if rank else "send"): (1, 24),
        }  # fmt: skip


def test_planned_bytes_of_a_layer_are_those_of_the_papers() -> None:
    """Narayanan et al. 2021, section 3.2: a ring sends 8 b s h (t - 1)/t a layer and device, which is four all-reduces of b s h."""
    config = Case({"tp": 2}, SHALLOW_SGD).config()
    one, two = (dataclasses.replace(config.model, num_layers=layers) for layers in (1, 2))
    sizes = []
    for model in (one, two):
        config.model = model
        sizes.append(planned(config, 0)["tp", "all_reduce"])
    b, s, h, micro_batches = 2, 16, 32, 4
    assert sizes[1][0] - sizes[0][0] == 4 * micro_batches
    assert sizes[1][1] - sizes[0][1] == 4 * micro_batches * b * s * h * 4
