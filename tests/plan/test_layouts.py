"""The layouts that a search tries, against all combinations of values that `resolve` lets pass."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.support import small_config
from tptrain.config import CHOICES, STAGES_PER_RANK, Config, ConfigError, resolve
from tptrain.plan.layouts import Layout, Layouts, divisors, nearest_devices


def unplanned(**changes: Any) -> Config:
    """Six layers, eight heads, twelve sequences a step."""
    return small_config(**{"model__num_layers": 6, "model__num_heads": 8, "train__global_batch_size": 12} | changes)


def passes(config: Config, layout: Layout) -> bool:
    for key, value in layout._asdict().items():
        setattr(config.parallel, key, value)
    try:
        resolve(config)
    except ConfigError:
        return False
    return True


def every(config: Config, devices: int, node: int) -> set[Layout]:
    """By trying all values."""
    found = set()
    numbers = range(1, devices + 1)
    for tp, pp in product(numbers, numbers):
        if devices % (tp * pp) or min(devices, node) % tp:
            continue
        rest = product(STAGES_PER_RANK, range(1, 7), range(1, 7), CHOICES["parallel.recompute"], (False, True))
        found |= {Layout(tp, pp, devices // tp // pp, *values) for values in rest}
    return {layout for layout in found if passes(config, layout)}


def is_other_name(layout: Layout) -> bool:
    """What the search leaves out, as another layout is the same."""
    alone = layout.pp == 1 and (layout.schedule, layout.stages_per_rank) != ("1f1b", 1)
    single = layout.schedule == "interleaved" and layout.stages_per_rank == 1
    unsplit = layout.tp == 1 and layout.sequence_parallel
    uneven = 6 % (layout.pp * layout.stages_per_rank) != 0 and layout.stages_per_rank not in (1, 2, 4)
    return alone or single or unsplit or uneven


@pytest.mark.parametrize(("devices", "node"), [(1, 8), (6, 8), (8, 4)])
def test_none_is_missing_and_all_can_run(devices: int, node: int) -> None:
    config = unplanned(hardware__devices_per_node=node, train__global_batch_size=6)
    found = list(Layouts(config, devices))
    assert len(found) == len(set(found))
    assert set(found) == {layout for layout in every(config, devices, node) if not is_other_name(layout)}


def test_config_of_a_layout_is_the_resolved_one() -> None:
    config = unplanned()
    tried = Layouts(config, 6)
    for layout in tried:
        wanted = unplanned(**{f"parallel__{key}": value for key, value in layout._asdict().items()})
        assert tried.config(layout) == wanted
    assert config == unplanned(), "left as it was"


def test_what_is_fixed_stays() -> None:
    """Also on one pipeline rank and on one tp rank, where the search would not try it by itself."""
    free = set(Layouts(unplanned(), 8))
    for fixed in ({"tp": 2}, {"schedule": "zb_v", "recompute": "full"}, {"micro_batch_size": 3}, {"dp": 2, "sequence_parallel": True}):
        found = set(Layouts(unplanned(), 8, fixed))
        assert found
        assert all(getattr(layout, key) == value for layout in found for key, value in fixed.items())
        kept = {layout for layout in free if all(getattr(layout, key) == value for key, value in fixed.items())}
        assert {layout for layout in found if layout.pp > 1 and layout.tp > 1} == {one for one in kept if one.pp > 1 and one.tp > 1}
        assert found >= kept


def test_a_tp_group_stays_in_its_node() -> None:
    assert {layout.tp for layout in Layouts(unplanned(hardware__devices_per_node=4), 8)} == {1, 2, 4}
    assert {layout.tp for layout in Layouts(unplanned(), 8)} == {1, 2, 4, 8}


def test_devices_without_a_layout() -> None:
    """Seven ranks: seven stages are more than six layers, and seven copies do not divide twelve sequences."""
    tried = Layouts(unplanned(), 7)
    assert list(tried) == []
    assert any("is no multiple of micro_batch_size 1 x dp 7 = 7" in str(error) for error in tried.refusals)
    assert nearest_devices(unplanned(), 7) == [6, 8]


def test_what_no_search_can_do_is_refused() -> None:
    config = unplanned()
    config.train.global_batch_size = None
    with pytest.raises(ConfigError, match=r"train.global_batch_size=null makes the batch follow"):
        Layouts(config, 4)
    with pytest.raises(ConfigError, match=r"parallel.schedule=mine.txt is not among .*: use gpipe, 1f1b"):
        Layouts(unplanned(), 4, {"schedule": "mine.txt"})
    config = unplanned()
    config.parallel.partition = [3, 3]
    with pytest.raises(ConfigError, match=r"parallel.partition=\[3,3\] is of one number of stages"):
        Layouts(config, 4)


def test_divisors() -> None:
    assert all(divisors(number) == [one for one in range(1, number + 1) if number % one == 0] for number in range(1, 200))


def test_overrides_are_what_one_types() -> None:
    layout = Layout(8, 16, 8, "interleaved", 6, 1, "selective", sequence_parallel=True)
    assert layout.overrides == (
        "parallel.tp=8 parallel.pp=16 parallel.dp=8 parallel.schedule=interleaved parallel.stages_per_rank=6 parallel.micro_batch_size=1 "
        "parallel.recompute=selective parallel.sequence_parallel=true"
    )
