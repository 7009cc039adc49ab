"""Seconds of one micro-batch on each stage: what it computes, and what of tp's communication nothing hides.

Communication that the code starts before a matrix product and waits for after it (`tensor_parallel/linear.py`) costs only what it takes
longer than the product; `Traffic.under` names the product. Where a schedule puts weight gradients off there is none to hide under, and on
a CPU the products leave the communication no core to run on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.pipeline.actions import Kind
from tptrain.plan.communication import Traffic, action_traffic
from tptrain.plan.compute import BlockWork, EndsWork, Part, block_work, ends_work
from tptrain.plan.kernels import Device, device_of
from tptrain.plan.links import Link, collective_seconds, group_links


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one rank. Those of tp are the exposed ones."""

    forward: float
    input_gradient: float
    """With what recomputation makes again."""
    weight_gradient: float
    forward_tp: float
    backward_tp: float
    """Of a backward in one go."""
    input_gradient_tp: float
    """Of an input gradient whose weight gradients are put off."""

    @property
    def backward(self) -> float:
        """Computation of both parts."""
        return self.input_gradient + self.weight_gradient


def stage_times(config: Config, bounds: Sequence[tuple[int, int]]) -> list[StageTime]:
    """Of stages with these layers, as (first, one past last). config: resolved. Raises ConfigError where the hardware's speed is
    unknown."""
    layers = config.model.num_layers
    clock = Clock(config)
    kinds = [(last - first, first == 0, last == layers) for first, last in bounds]
    known = {kind: clock.stage(*kind) for kind in set(kinds)}
    return [known[kind] for kind in kinds]


class Clock:
    """Prices the pieces of a resolved config's model once, for its stages. Raises ConfigError where the hardware's speed is unknown."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, device_of(config)
        self.link = group_links(config).get("tp")
        block, ends = block_work(config), ends_work(config)
        self.block, self.block_again = _seconds(self.device, block.whole), self.device.seconds(block.again)
        self.embedding, self.loss = _seconds(self.device, ends.embedding), _seconds(self.device, ends.head + ends.loss)
        self.logits_again = self.device.seconds(ends.again)
        self.windows = _windows(self.device, block, ends)

    def stage(self, layers: int, is_first: bool, is_last: bool) -> StageTime:
        """A stage of so many blocks, with the embedding or the head."""
        parts = [
            layers * block + is_first * embedding + is_last * loss
            for block, embedding, loss in zip(self.block, self.embedding, self.loss, strict=True)
        ]
        again = layers * self.block_again + is_last * self.logits_again
        first = 0 if is_first else self.config.model.num_layers - layers if is_last else 1
        traffic = action_traffic(self.config, first, first + layers)
        forward_tp, whole_tp = (self._exposed(traffic[kind], split=False) for kind in (Kind.FORWARD, Kind.INPUT_GRADIENT))
        split_tp = self._exposed(traffic[Kind.INPUT_GRADIENT], split=True)
        return StageTime(parts[0], parts[1] + again, parts[2], forward_tp, whole_tp, split_tp)

    def _exposed(self, traffic: Sequence[Traffic], split: bool) -> float:
        return sum(self._exposed_of(each, self.link, split) for each in traffic) if self.link is not None else 0.0

    def _exposed_of(self, traffic: Traffic, link: Link, split: bool) -> float:
        """What the calls of one kind take longer than what they run under."""
        seconds = collective_seconds(traffic.operation, self.config.parallel.tp, traffic.bytes // traffic.calls, link)
        place = "head" if traffic.purpose.startswith("head") else "columns"
        windows = self.windows.get((traffic.under, place), [0.0])
        if self.config.hardware.device == "cpu" or (split and traffic.under == "weight gradient"):
            windows = [0.0]
        return traffic.calls * sum(max(0.0, seconds - window) for window in windows) / len(windows)


def _seconds(device: Device, part: Part) -> tuple[float, float, float]:
    return device.seconds(part.forward), device.seconds(part.input_gradient), device.seconds(part.weight_gradient)


def _windows(device: Device, block: BlockWork, ends: EndsWork) -> dict[tuple[str, str], list[float]]:
    """Seconds of the products that communication runs under, by `Traffic.under` and place; a block has two groups of column layers."""
    columns = [_seconds(device, part) for part in (block.attention_columns, block.mlp_columns)]
    head = _seconds(device, ends.head)
    return {
        ("input gradient", "columns"): [inputs for _, inputs, _ in columns],
        ("weight gradient", "columns"): [weights for _, _, weights in columns],
        ("input gradient", "head"): [head[1]],
        ("weight gradient", "head"): [head[2]],
    }
