"""What of a report is slow or short: each rule on a report of made-up numbers, and one that is just within it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.support import small_config
from tptrain.config import DoctorConfig
from tptrain.doctor.judge import STORE_DISK_BYTES, better, diagnose, shortfalls
from tptrain.doctor.needs import Needs, needs_of
from tptrain.doctor.record import Link, RankRecord, Report
from tptrain.model.flops import num_parameters

LIMITS = DoctorConfig(slow_rank=0.3, slow_link=0.5)
NEEDS = Needs(states=[1000] * 4, checkpoint=100, checkpoints=3, existing=50)


def rank(number: int, **changes: Any) -> RankRecord:
    record = RankRecord(
        rank=number,
        host="ab"[number // 2],
        device="cpu, 1 thread",
        cores=8,
        threads=1,
        memory_free_bytes=10**9,
        memory_total_bytes=2 * 10**9,
        run_disk_free_bytes=10**9,
        store_disk_free_bytes=STORE_DISK_BYTES,
        matmul_flops_per_second={"fp32": 1e11, "bf16": 4e11},
        core_share=1.0,
    )
    return dataclasses.replace(record, **changes)


def link(kind: str, ranks: list[int], bandwidth: float, operation: str = "all-reduce", across: bool = False) -> Link:
    return Link(kind, operation, ranks, across, 1e-4, bandwidth)


def report(links: list[Link] | None = None, **changes: dict[int, Any]) -> Report:
    """Four ranks on two hosts. changes: for each field the ranks that have another value."""
    found = [rank(number, **{name: values[number] for name, values in changes.items() if number in values}) for number in range(4)]
    return Report({}, found, links or [])


def findings(found: Report, needs: Needs = NEEDS) -> list[tuple[str, str]]:
    return [(finding.kind, finding.text) for finding in diagnose(found, LIMITS, needs).findings]


def test_nothing_is_wrong_with_equal_ranks() -> None:
    assert findings(report()) == []


def test_a_slow_rank_is_judged_by_the_worse_of_its_products() -> None:
    slow = report(matmul_flops_per_second={2: {"fp32": 0.9e11, "bf16": 1e11}})
    assert findings(slow) == [("slow rank", "rank 2 on b: 100 GFLOP/s in bf16, 75 % below the median of the others, 400 GFLOP/s")]
    assert diagnose(slow, LIMITS, NEEDS).slowest_rank == 2
    assert findings(report(matmul_flops_per_second={2: {"fp32": 0.71e11, "bf16": 4e11}})) == [], "29 % below"
    assert findings(report(matmul_flops_per_second={2: {"fp32": 0.69e11, "bf16": 4e11}})), "31 % below"


def test_of_two_ranks_the_slower_one_is_slow_and_of_one_none() -> None:
    two = Report({}, [rank(0), rank(1, matmul_flops_per_second={"fp32": 0.5e11, "bf16": 4e11})], [])
    assert [kind for kind, _ in findings(two)] == ["slow rank"]
    assert "50 % below" in findings(two)[0][1]
    alone = diagnose(Report({}, [rank(0)], []), LIMITS, NEEDS)
    assert (alone.findings, alone.slowest_rank, alone.slowest_link) == ([], None, None)


def test_the_others_median_leaves_the_value_out() -> None:
    found = [short.share for short in shortfalls([4.0, 8.0, 10.0, 16.0]) if short]
    assert found == pytest.approx([1 - 4 / 10, 1 - 8 / 10, 1 - 10 / 8, 1 - 16 / 8])


@pytest.mark.parametrize(
    ("shares", "cores", "found"),
    [
        ({3: 0.5}, 8, "rank 3 on b had the cores for 50 % of the time: something else runs there"),
        ({2: 0.4, 3: 0.6}, 8, "ranks 2, 3 on b had the cores for 40 % to 60 % of the time: something else runs there"),
        ({2: 0.4, 3: 0.4}, 1, None),  # two ranks share one core: 50 % is their even share, and 35 % its limit
        ({2: 0.3, 3: 0.4}, 1, "rank 2 on b had the cores for 30 % of the time: something else runs there"),
        ({0: 0.71}, 8, None),
    ],
)
def test_busy_cores(shares: dict[int, float], cores: int, found: str | None) -> None:
    assert findings(report(core_share=shares, cores=dict.fromkeys(range(4), cores))) == ([("busy cores", found)] if found else [])


def test_a_link_is_compared_with_those_like_it_alone() -> None:
    links = [
        link("tp", [0, 1], 10e9), link("tp", [2, 3], 4e9), link("dp", [0, 2], 1e9, across=True), link("dp", [1, 3], 0.9e9, across=True),
        link("all", [0, 1, 2, 3], 0.5e9),
    ]  # fmt: skip
    found = diagnose(report(links), LIMITS, NEEDS)
    assert [(finding.kind, finding.text) for finding in found.findings] == [
        ("slow link", "tp all-reduce of ranks 2, 3: 4.00 GB/s, 60 % below the median of the others like it, 10.0 GB/s")
    ]
    assert found.slowest_link == 1
    links[1].across = True
    found = diagnose(report(links), LIMITS, NEEDS)
    assert found.findings == [], "one of a host and one between hosts need not be equally fast"
    assert found.slowest_link == 3


def test_short_memory_is_that_of_all_ranks_of_a_host() -> None:
    assert findings(report(memory_free_bytes={2: 2000, 3: 2000})) == []
    found = findings(report(memory_free_bytes={2: 2000, 3: 1999}))
    assert found == [("memory", "2.00 kB free on b, and the weights, gradients and moments of ranks 2, 3 alone take 2.00 kB")]
    assert findings(report(memory_free_bytes={2: None, 3: None})) == []


def test_short_memory_of_a_gpu_is_that_of_its_rank() -> None:
    gpus = dict.fromkeys(range(4), "NVIDIA H100 0")
    assert findings(report(device=gpus, memory_free_bytes={3: 1000})) == []
    assert [kind for kind, _ in findings(report(device=gpus, memory_free_bytes={3: 999}))] == ["memory"]


def test_short_disk() -> None:
    assert findings(report(run_disk_free_bytes={1: 250})) == [], "3 checkpoints of 100 bytes, of which 50 are there"
    ((kind, text),) = findings(report(run_disk_free_bytes={1: 249}))
    assert (kind, "249 B free for the run folder on a" in text, "want 250 B more" in text) == ("disk", True, True)
    ((kind, text),) = findings(report(store_disk_free_bytes={3: STORE_DISK_BYTES - 1}))
    assert (kind, "free for data.store_dir on b" in text) == ("disk", True)


def test_a_clock_is_off_by_more_than_its_error() -> None:
    assert findings(report(clock_offset_seconds={1: -2.0}, clock_error_seconds={1: 1.0})) == []
    ((kind, text),) = findings(report(clock_offset_seconds={1: -2.0}, clock_error_seconds={1: 0.001}))
    assert (kind, text) == ("clock", "the clock of rank 1 on a is -2.00 s off rank 0's (within 1.0 ms): let both hosts use NTP")


def test_a_run_folder_of_ones_own() -> None:
    ((kind, text),) = findings(report(sees_run_folder={2: False, 3: False}))
    assert (kind, text.split(":")[0]) == (
        "run folder",
        "ranks 2, 3 do not see rank 0's run folder, where every rank writes its checkpoints",
    )


def test_of_two_rounds_the_better_number_counts() -> None:
    first = report([link("tp", [0, 1], 4e9)], matmul_flops_per_second={1: {"fp32": 0.5e11, "bf16": 5e11}}, core_share={1: 0.4})
    second = report([link("tp", [0, 1], 6e9)], core_share={1: 0.9})
    found = better(first, second)
    assert found.ranks[1].matmul_flops_per_second == {"fp32": 1e11, "bf16": 5e11}
    assert (found.ranks[1].core_share, found.links[0].bandwidth_bytes_per_second) == (0.9, 6e9)


def test_a_report_survives_json() -> None:
    found = report([link("pp", [0, 2], 1e9, "send")])
    assert Report.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(("name", "momentum", "moments"), [("adamw", 0.0, 2), ("sgd", 0.9, 1), ("sgd", 0.0, 0)])
def test_needs_add_up_to_the_whole_model(name: str, momentum: float, moments: int, tmp_path: Path) -> None:
    config = small_config(
        parallel__tp=2, parallel__pp=2, parallel__dp=2, optimizer__name=name, optimizer__momentum=momentum, model__tie_embeddings=False,
        checkpoint__keep=4,
    )  # fmt: skip
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000001/part").write_bytes(bytes(77))
    needs, parameters = needs_of(config, tmp_path), num_parameters(config.model)
    assert (needs.checkpoint, needs.checkpoints, needs.existing) == (parameters * (4 + 4 * moments), 5, 77)
    assert len(needs.states) == 8
    assert sum(needs.states) == pytest.approx(parameters * (8 + 4 * moments), abs=8), "whatever is split or sharded is held once"
    assert len(set(needs.states[:4])) == len(set(needs.states[4:])) == 1, "the first stage's ranks, then the last one's"
