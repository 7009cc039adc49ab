"""Clocks, links and matrix products on four ranks, one of which has another clock and a slow way of sending."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.support import small_config
from tptrain.doctor import clock, links, matmul
from tptrain.doctor.judge import link_shortfalls
from tptrain.doctor.links import measure_links, slowest_view
from tptrain.doctor.record import Link
from tptrain.doctor.together import Together
from tptrain.mesh import build_mesh

SKEW_SECONDS = 5.0
DELAY_SECONDS = 0.05
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"parallel__tp": 2, "parallel__pp": 2},
    "tp2_dp2_sp": {"parallel__tp": 2, "parallel__dp": 2, "parallel__sequence_parallel": True},
    "pp4_interleaved": {"model__num_layers": 8, "parallel__pp": 4, "parallel__schedule": "interleaved"},
}


class SkewedTime:
    """A clock that is fast by SKEW_SECONDS."""

    @staticmethod
    def time() -> float:
        return time.time() + SKEW_SECONDS


def examine(rank: int) -> dict[str, Any]:
    """Everything on one rank: rank 2 has another clock, and what it sends is late."""
    device, results = torch.device("cpu"), {}
    links._SECONDS, links.LARGE_BYTES, matmul.WINDOW_SECONDS = 0.0, {"cpu": 2**18}, 0.02
    if rank == 2:
        clock.time = SkewedTime()  # type: ignore[assignment]
        send = dist.send

        def late(*arguments: Any, **keywords: Any) -> None:
            time.sleep(DELAY_SECONDS)
            send(*arguments, **keywords)

    for name, changes in LAYOUTS.items():
        config = small_config(**changes)
        mesh = build_mesh(config.parallel, device, 60)
        together = Together(mesh.world)
        if not results:
            results["offset"] = clock.clock_offset(mesh.world)
            results["rate"] = matmul.matmul_rate(torch.float32, device, together)
        if rank == 2 and name == "tp2_pp2":
            dist.send = late
        hosts = ["a", "a", "b", "b"]
        results[name] = [asdict(link) for link in measure_links(mesh, config.parallel, hosts, together)]
        if rank == 2:
            dist.send = send
    return results


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(4, examine)


def links_of(found: list[dict[str, Any]], layout: str) -> list[Link]:
    return slowest_view([Link(**link) for rank in found for link in rank[layout]])


def test_a_clock_is_found_within_its_error(found: list[dict[str, Any]]) -> None:
    expected = [0.0, 0.0, SKEW_SECONDS, 0.0]
    for (offset, error), true in zip([rank["offset"] for rank in found], expected, strict=True):
        assert abs(offset - true) <= error + 1e-4
        assert error < SKEW_SECONDS / 2, "else it said nothing"
    assert found[0]["offset"] == (0.0, 0.0)


def test_every_rank_multiplies(found: list[dict[str, Any]]) -> None:
    for rate, share in (rank["rate"] for rank in found):
        assert rate > 0
        assert 0 < share < 1.5


def test_every_group_of_a_layout_is_measured_once(found: list[dict[str, Any]]) -> None:
    names = {layout: sorted(link.name for link in links_of(found, layout)) for layout in LAYOUTS}
    everyone = "all all-reduce of ranks 0-3"
    assert names["tp2_pp2"] == sorted(
        [everyone, "tp all-reduce of ranks 0, 1", "tp all-reduce of ranks 2, 3", "pp send between ranks 0, 2", "pp send between ranks 1, 3"]
    )
    assert names["tp2_dp2_sp"] == sorted(
        [everyone]
        + [f"tp {operation} of ranks {pair}" for operation in ("all-gather", "reduce-scatter") for pair in ("0, 1", "2, 3")]
        + [f"dp {operation} of ranks {pair}" for operation in ("all-gather", "reduce-scatter") for pair in ("0, 2", "1, 3")]
    )
    pairs = [f"pp send between ranks {pair}" for pair in ("0, 1", "1, 2", "2, 3", "0, 3")]
    assert names["pp4_interleaved"] == sorted([everyone, *pairs])


def test_links_between_hosts_are_told_apart(found: list[dict[str, Any]]) -> None:
    across = {link.name for link in links_of(found, "tp2_pp2") if link.across}
    assert across == {"pp send between ranks 0, 2", "pp send between ranks 1, 3", "all all-reduce of ranks 0-3"}


def test_a_late_link_is_the_slowest(found: list[dict[str, Any]]) -> None:
    """Rank 2 answers rank 0 late; rank 3 answers rank 1 at once."""
    measured = links_of(found, "tp2_pp2")
    late = next(link for link in measured if link.name == "pp send between ranks 0, 2")
    assert late.latency_seconds >= DELAY_SECONDS / 2
    assert late.bandwidth_bytes_per_second <= 2**18 / (DELAY_SECONDS / 2)
    shares = {
        link.name: short.share for link, short in zip(measured, link_shortfalls(measured), strict=True) if short and link.kind == "pp"
    }
    assert shares[late.name] == max(shares.values()) > 0
