"""Every layout of a number of devices: tp x pp x dp, schedule, stages a rank, micro-batch size, recomputation, sequence parallelism.

What is valid is what `config.settle` lets pass. Left out is what is another layout by another name: on one pipeline rank the order of
the micro-batches is all that a schedule could change, so only 1f1b is tried there; interleaved with one stage a rank is 1f1b; with tp=1
there is nothing that sequence parallelism could split. Stages a rank are the numbers that divide the layers evenly, and powers of two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tptrain.config import CHOICES, STAGES_PER_RANK, Config, ConfigError, as_text, check_nodes, check_values, refuse, settle


class Layout(NamedTuple):
    """One way to spread a training over devices, with the names of the keys of `parallel`."""

    tp: int
    pp: int
    dp: int
    schedule: str
    stages_per_rank: int
    micro_batch_size: int
    recompute: str
    sequence_parallel: bool

    @property
    def overrides(self) -> str:
        """What to type for it."""
        return " ".join(f"parallel.{key}={as_text(value)}" for key, value in self._asdict().items())


class Layouts:
    """The valid layouts of a config on so many devices."""

    def __init__(self, config: Config, devices: int, fixed: Mapping[str, Any] | None = None) -> None:
        """config: need not be resolved; its layout is of no account. fixed: keys of `parallel` that keep these values.

        Raises ConfigError for a value that is wrong whatever the layout is.
        """
        self.base = _base(config)
        self.devices = devices
        self.fixed = dict(fixed or {})
        self._on_a_node = min(devices, config.hardware.devices_per_node or devices)
        self.refusals: list[ConfigError] = []
        """Why layouts that were tried are none, in the order in which they were."""
        unknown = self.fixed.get("schedule", "1f1b")
        if unknown not in STAGES_PER_RANK:
            rule = "is not among the schedules that can be searched"
            raise refuse("parallel.schedule", unknown, rule, f"use {', '.join(STAGES_PER_RANK)}")

    def config(self, layout: Layout) -> Config:
        """The resolved config of a layout. Shares what no layout changes with the others. Raises ConfigError for one that is invalid."""
        config = copy.copy(self.base)
        config.parallel = copy.copy(self.base.parallel)
        config.train = copy.copy(self.base.train)
        for key, value in layout._asdict().items():
            setattr(config.parallel, key, value)
        settle(config)
        return config

    def __iter__(self) -> Iterator[Layout]:
        """Ordered by tp, pp and the rest."""
        for tp in self._values("tp", divisors(self.devices)):
            if self.devices % tp == 0 and self._is_valid(_plain(tp, 1, 1)):
                for pp in self._values("pp", divisors(self.devices // tp)):
                    yield from self._of_grid(tp, pp)

    def _of_grid(self, tp: int, pp: int) -> Iterator[Layout]:
        """The layouts of tp x pp x what is left."""
        dp, rest = divmod(self.devices, tp * pp)
        if rest or not self._is_valid(_plain(tp, pp, dp)) or dp not in self._values("dp", [dp]):
            return
        sizes = [size for size in self._sizes(dp) if self._is_valid(_plain(tp, pp, dp)._replace(micro_batch_size=size))]
        for schedule, stages in self._schedules(pp):
            for split in self._values("sequence_parallel", [False, True] if tp > 1 else [False]):
                pattern = _plain(tp, pp, dp)._replace(schedule=schedule, stages_per_rank=stages, sequence_parallel=split)
                if sizes and self._is_valid(pattern._replace(micro_batch_size=sizes[0])):
                    for size in sizes:
                        for recompute in self._values("recompute", CHOICES["parallel.recompute"]):
                            yield pattern._replace(micro_batch_size=size, recompute=recompute)

    def _schedules(self, pp: int) -> Iterator[tuple[str, int]]:
        """Schedules with their stages a rank."""
        for name in self._values("schedule", list(STAGES_PER_RANK) if pp > 1 else ["1f1b"]):
            needed = STAGES_PER_RANK[name]
            least = 2 if name == "interleaved" and "stages_per_rank" not in self.fixed else 1
            several = self._stages(pp) if pp > 1 else [1]
            for stages in self._values("stages_per_rank", [needed] if needed else several):
                if stages >= least:
                    yield name, stages

    def _stages(self, pp: int) -> list[int]:
        """Stages a rank where the schedule leaves them open."""
        layers = self.base.model.num_layers
        return [each for each in range(1, layers // pp + 1) if layers % (pp * each) == 0 or each & (each - 1) == 0]

    def _sizes(self, dp: int) -> list[int]:
        """Micro-batch sizes, the smallest first."""
        return list(self._values("micro_batch_size", divisors(max(1, self.base.batch_size // dp))))

    def _values(self, key: str, values: Any) -> Any:
        """What a key may be: the value that is fixed, or these."""
        return [self.fixed[key]] if key in self.fixed else values

    def _is_valid(self, layout: Layout) -> bool:
        """Whether a layout can run; if not, the reason goes to `refusals`."""
        try:
            check_nodes(self.config(layout).parallel, self._on_a_node, f"use a tp that divides {self._on_a_node}")
        except ConfigError as error:
            self.refusals.append(error)
            return False
        return True


def divisors(number: int) -> list[int]:
    """All of them, the smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return small + [number // one for one in reversed(small) if one * one != number]


def nearest_devices(config: Config, devices: int, fixed: Mapping[str, Any] | None = None, reach: int = 64) -> list[int]:
    """The numbers of devices nearest to one that has no layout, on either side, which have some."""
    below = (count for count in range(devices - 1, max(0, devices - reach - 1), -1) if any(True for _ in Layouts(config, count, fixed)))
    above = (count for count in range(devices + 1, devices + reach + 1) if any(True for _ in Layouts(config, count, fixed)))
    return [count for side in (below, above) for count in [next(side, None)] if count is not None]


def _plain(tp: int, pp: int, dp: int) -> Layout:
    """The simplest layout of a grid, from which the others follow."""
    return Layout(tp, pp, dp, "1f1b", 1, 1, "none", sequence_parallel=False)


def _base(config: Config) -> Config:
    """The config on one device, its single values checked."""
    check_values(config)
    if isinstance(config.parallel.partition, list):
        rule = "is of one number of stages, and a search tries many"
        raise refuse("parallel.partition", config.parallel.partition, rule, "use balanced or even, or leave hardware.devices out")
    if config.train.global_batch_size is None:
        rule = "makes the batch follow from the layout, so that layouts of a search would train differently"
        raise refuse("train.global_batch_size", None, rule, "use the number of sequences of a step, such as train.global_batch_size=1536")
    base = copy.deepcopy(config)
    for key, value in _plain(1, 1, 1)._asdict().items():
        setattr(base.parallel, key, value)
    settle(base)
    return base
