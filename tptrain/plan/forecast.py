"""What is known of one layout before it runs: memory, traffic and time put together, and why the rest is unknown."""

from __future__ import annotations

from dataclasses import dataclass

from tptrain.config import Config, ConfigError
from tptrain.plan.communication import Traffic, step_traffic
from tptrain.plan.links import Link, group_links, group_size, traffic_seconds
from tptrain.plan.memory import RankMemory, rank_memory
from tptrain.plan.pipeline import PipelinePlan, describe
from tptrain.plan.time import StepTime, Training, step_time, training


@dataclass(frozen=True)
class Forecast:
    """One layout."""

    config: Config
    """Resolved."""
    pipeline: PipelinePlan
    ranks: list[RankMemory]
    """What each pipeline rank needs."""
    traffic: list[list[Traffic]]
    """Of each pipeline rank, in one step."""
    links: dict[str, Link] | str
    """Of each group with more than one rank, or why they are unknown."""
    time: StepTime | str
    """Of a step, or why it is unknown."""

    @property
    def fullest(self) -> RankMemory:
        """The pipeline rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def missing_bytes(self) -> float | None:
        """What the fullest rank needs beyond its device's memory, 0 where it fits; None: the device's memory is unknown."""
        device = self.config.hardware.memory_bytes
        return None if device is None else max(0.0, self.fullest.total - device)

    @property
    def training(self) -> Training | None:
        """The whole training; None where a step's time is unknown."""
        return None if isinstance(self.time, str) else training(self.config, self.time)

    def seconds(self, traffic: Traffic) -> float | None:
        """What these calls take one after another with nothing else going on; None where their link is unknown."""
        if group_size(self.config, traffic.group) == 1 or not traffic.calls:
            return 0.0
        return None if isinstance(self.links, str) else traffic_seconds(self.config, traffic, self.links)


def forecast(config: Config, pipeline: PipelinePlan | None = None, time: StepTime | str | None = None) -> Forecast:
    """What is known of a resolved config's layout. pipeline, time: its own, where they are worked out already.

    Raises ConfigError for a schedule file that cannot run.
    """
    pipeline = pipeline or describe(config)
    traffic = [step_traffic(config, pipeline, rank) for rank in range(config.parallel.pp)]
    links: dict[str, Link] | str
    try:
        links = group_links(config)
    except ConfigError as error:
        links = str(error)
    if time is None:
        try:
            time = step_time(config, pipeline)
        except ConfigError as error:
            time = str(error)
    return Forecast(config, pipeline, rank_memory(config, pipeline), traffic, links, time)
