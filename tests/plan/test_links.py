"""The times of collectives against figures worked out by hand, and which link each group runs on."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support import small_config
from tptrain.config import Config, ConfigError
from tptrain.plan.links import Link, collective_seconds, group_links

LINK = Link(bytes_per_second=100.0, latency_seconds=1.0)


@pytest.mark.parametrize(
    ("operation", "ranks", "size", "seconds"),
    [
        ("all_reduce", 4, 40000, 6 + 2 * 0.75 * 400),  # a ring: 2 x 3 steps, each of a quarter
        ("all_reduce", 1024, 100, 20 + 2),  # a tree: twice 10 steps; a ring has 2046
        ("all_gather", 4, 40000, 3 + 0.75 * 400),
        ("reduce_scatter", 8, 800, 7 + 7 / 8 * 8),
        ("broadcast", 8, 100, 3 * (1 + 1)),
        ("broadcast", 4, 40000, 2 + 3 + 2 * 0.75 * 400),
        ("send", 2, 200, 3),
        ("receive", 2, 200, 3),
        ("all_reduce", 1, 200, 0),
    ],
)
def test_seconds_are_those_of_the_formulas(operation: str, ranks: int, size: int, seconds: float) -> None:
    assert collective_seconds(operation, ranks, size, LINK) == pytest.approx(seconds)


def test_an_unknown_operation_is_an_error() -> None:
    with pytest.raises(ValueError, match="all_to_all"):
        collective_seconds("all_to_all", 4, 100, LINK)


def of_hardware(tp: int, pp: int, dp: int) -> Config:
    config = small_config()
    config.parallel.tp, config.parallel.pp, config.parallel.dp = tp, pp, dp
    config.hardware = dataclasses.replace(
        config.hardware, devices_per_node=8, node_bytes_per_second=300e9, node_latency_seconds=1e-6, network_bytes_per_second=50e9,
        network_latency_seconds=5e-6,
    )  # fmt: skip
    return config


INSIDE, BETWEEN = Link(300e9, 1e-6), Link(50e9, 5e-6)


def test_tp_lies_inside_a_machine_and_what_is_further_out_between() -> None:
    links = group_links(of_hardware(8, 8, 16))
    assert links == {"tp": INSIDE, "dp": BETWEEN, "pp_up": BETWEEN, "pp_down": BETWEEN, "embedding": BETWEEN, "world": Link(300e9, 5e-6)}


def test_groups_of_one_machine_never_leave_it() -> None:
    assert set(group_links(of_hardware(2, 2, 2)).values()) == {INSIDE}
    assert group_links(of_hardware(1, 1, 1)) == {}


def test_members_on_one_machine_share_its_network() -> None:
    assert group_links(of_hardware(2, 1, 8))["dp"] == Link(4 * 50e9, 5e-6)  # 4 ranks of it on each machine
    assert group_links(of_hardware(2, 8, 1))["pp_up"] == BETWEEN, "neighbours alone talk"


def test_a_group_over_several_machines_counts_its_ranks_on_one() -> None:
    assert group_links(of_hardware(16, 1, 1))["tp"] == Link(300e9, 5e-6), "8 networks are faster than the machine's own links"


def test_unknown_links_are_refused() -> None:
    config = of_hardware(2, 1, 1)
    config.hardware.node_bytes_per_second = None
    with pytest.raises(ConfigError, match=r"hardware.node_bytes_per_second=null is unknown, and the ranks of tp talk over it"):
        group_links(config)
