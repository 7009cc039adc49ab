"""What is known of one layout before it runs: memory, traffic and time put together, and what would make the rest known."""

from __future__ import annotations

from dataclasses import dataclass

from tptrain.config import Config, ConfigError
from tptrain.plan.communication import Traffic, step_traffic
from tptrain.plan.links import Link, collective_seconds, group_links
from tptrain.plan.memory import RankMemory, rank_memory
from tptrain.plan.pipeline import PipelinePlan, describe
from tptrain.plan.time import StepTime, step_time

SECONDS_A_DAY = 86400


@dataclass(frozen=True)
class Estimate:
    """One layout."""

    config: Config
    """Resolved."""
    pipeline: PipelinePlan
    memory: list[RankMemory]
    """Of each pipeline rank."""
    traffic: list[list[Traffic]]
    """Of each pipeline rank, on the first tp and dp rank."""
    links: dict[str, Link] | str
    """Of each group with more than one rank, or why they are unknown."""
    time: StepTime | str
    """Of a step, or why it is unknown."""

    @property
    def peak(self) -> RankMemory:
        """The pipeline rank that needs most memory."""
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def missing_bytes(self) -> float | None:
        """What the fullest rank needs beyond its device's memory, 0 where it fits; None: the device's memory is unknown."""
        device = self.config.hardware.memory_bytes
        return None if device is None else max(0.0, self.peak.total - device)

    @property
    def tokens(self) -> float:
        """Of the whole training."""
        config = self.config
        return config.plan.tokens or config.train.max_steps * config.batch_size * config.data.seq_len

    @property
    def days(self) -> float | None:
        """Of the whole training, without evaluations and checkpoints."""
        return None if isinstance(self.time, str) else self.tokens / self.time.tokens_per_second / SECONDS_A_DAY

    @property
    def dollars(self) -> float | None:
        """What the devices cost for so long."""
        price = self.config.hardware.dollars_per_device_hour
        return None if price is None or self.days is None else self.days * 24 * self.config.processes * price

    def seconds(self, traffic: Traffic) -> float | None:
        """Of these calls, one after another, were nothing computed meanwhile."""
        ranks = group_size(self.config, traffic.group)
        if ranks == 1:
            return 0.0
        if isinstance(self.links, str) or not traffic.calls:
            return None if traffic.calls else 0.0
        return traffic.calls * collective_seconds(traffic.operation, ranks, traffic.bytes // traffic.calls, self.links[traffic.group])


def estimate(config: Config) -> Estimate:
    """What is known of a resolved config's layout. Raises ConfigError for a schedule file that cannot run."""
    pipeline = describe(config)
    traffic = [step_traffic(config, pipeline, rank) for rank in range(config.parallel.pp)]
    links: dict[str, Link] | str
    time: StepTime | str
    try:
        links = group_links(config)
    except ConfigError as error:
        links = str(error)
    try:
        time = step_time(config, pipeline)
    except ConfigError as error:
        time = str(error)
    return Estimate(config, pipeline, rank_memory(config, pipeline), traffic, links, time)


def group_size(config: Config, group: str) -> int:
    """Ranks of a group that `Traffic` names."""
    parallel = config.parallel
    sizes = {"tp": parallel.tp, "dp": int(parallel.dp), "world": config.processes}
    return sizes.get(group, min(2, parallel.pp))
