"""The schedule never changes the result: every schedule, with 1 to 3 stages a rank and 1 to 9 micro-batches, against one process.

The same promise and the same limits as in `test_equality.py`, for a few steps of a narrow model with one layer more than stages.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.test_equality import APART, DROPOUT, LLAMA_SGD, SP, TIED_SGD, UNTIED_ADAMW, Case, assert_equal, train_alone, train_layouts

HALF = 2
"""Steps before and after the evaluation."""
pytestmark = pytest.mark.timeout(1500)  # the first test waits for the training of all cases

SCHEDULES = [
    ("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("interleaved", 3), ("zb_h1", 1), ("zb_v", 2),
]  # fmt: skip
GPT_SGD = TIED_SGD | {"model__hidden_size": 16, "model__ffn_hidden_size": 32}
FAMILIES = [
    GPT_SGD, GPT_SGD | UNTIED_ADAMW | {"optimizer__name": "adamw", "optimizer__lr": 3e-3},
    GPT_SGD | LLAMA_SGD, GPT_SGD | LLAMA_SGD | {"model__tie_embeddings": True},
]  # fmt: skip


def case_of(schedule: str, stages: int, pp: int, micro_batches: int, family: dict[str, Any], layers: int = 0, **layout: Any) -> Case:
    """One micro-batch is one sequence on each dp rank."""
    batch = micro_batches * layout.get("dp", 1)
    base = family | {"model__num_layers": layers or pp * stages + 1, "train__global_batch_size": batch, "parallel__micro_batch_size": 1}
    return Case({"pp": pp, "schedule": schedule, "stages_per_rank": stages} | layout, base)


CASES = [
    *(case_of(schedule, stages, pp, m, FAMILIES[(m + pp // 2 + number) % 4])
      for pp, numbers in ((2, range(1, 10)), (4, (1, 3, 4, 6, 9))) for number, (schedule, stages) in enumerate(SCHEDULES) for m in numbers),
    *(case_of(schedule, stages, 2, m, family, **layout)
      for schedule, stages in SCHEDULES for m, family, layout in [
          (4, FAMILIES[0], {"tp": 2}), (4, FAMILIES[1], {"dp": 2}), (2, FAMILIES[3], {"dp": 2}), (5, FAMILIES[2], {"tp": 2} | SP),
      ]),
    *(case_of(schedule, stages, 2, 4, family | more, recompute=how, **layout)
      for schedule, stages in SCHEDULES[3:] for how, family, more, layout in [
          ("full", FAMILIES[0], DROPOUT, {}), ("selective", FAMILIES[2], {}, {"tp": 2} | SP),
      ]),
    *(case_of(schedule, stages, 2, 4, FAMILIES[1], tp=2, dp=2) for schedule, stages in (("interleaved", 2), ("zb_v", 2))),
    *(case_of(schedule, stages, 1, 3, FAMILIES[0]) for schedule, stages in (("gpipe", 3), ("interleaved", 2), ("zb_v", 2), ("zb_h1", 1))),
    *(case_of(schedule, 2, 2, 4, FAMILIES[0], layers=7, partition=[1, 3, 2, 1]) for schedule in ("interleaved", "zb_v")),
    # documents kept apart, also on ranks that hold neither the first nor the last stage
    case_of("1f1b", 1, 4, 6, FAMILIES[0] | APART), case_of("zb_v", 2, 2, 3, FAMILIES[0] | APART, dp=2),
    case_of("zb_v", 2, 2, 4, FAMILIES[2] | APART, tp=2, **SP),
    case_of("interleaved", 2, 2, 4, FAMILIES[2] | APART | DROPOUT, recompute="full", dp=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return train_alone(CASES, HALF)


@pytest.fixture(scope="module")
def parallel() -> dict[str, list[Any]]:
    return train_layouts(CASES, HALF)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_schedule_equals_one_process(case: Case, serial: dict[str, Any], parallel: dict[str, list[Any]]) -> None:
    assert_equal(serial[case.twin], parallel[case.name])
