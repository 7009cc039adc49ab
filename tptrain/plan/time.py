"""How long a training step takes, what of it is computation, communication and waiting, and what a training then takes and costs.

    gather dp's weights │ the pipeline's schedule, simulated │ reduce dp's gradients │ sums │ norm, clip, optimizer
                        │ (forward, input and weight gradient: seconds of `stage_time.py`)

`step_time` simulates every action. `estimate` takes the pipeline's time by formula (`closed_form.py`), without a schedule.
Not modelled: data loading, evaluation, checkpoints, and what one rank's device takes longer than another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tptrain.config import Config
from tptrain.model.flops import flops_per_token
from tptrain.pipeline.actions import Kind
from tptrain.pipeline.simulate import Costs, Simulation, simulate
from tptrain.plan.closed_form import pipeline_seconds, stage_ranks
from tptrain.plan.communication import Traffic, fully_shard_traffic, message_bytes, once_traffic
from tptrain.plan.compute import update_work
from tptrain.plan.kernels import device_of
from tptrain.plan.links import collective_seconds, group_links, traffic_seconds
from tptrain.plan.parameters import rank_parameters
from tptrain.plan.pipeline import PipelinePlan, StagePlan, describe, stage_layers
from tptrain.plan.stage_time import StageTime, stage_times


@dataclass(frozen=True)
class StepTime:
    """A training step. The parts are those of the pipeline rank that computes longest, and add up to the step."""

    step_seconds: float
    tokens_per_second: float
    """Of the whole job."""
    mfu: float | None
    """Model FLOPs over what the devices could do, as `monitor/metrics.py` has it; None where the peak is unknown."""
    bubble_fraction: float
    """The share of the ranks' time in the pipeline in which they do not compute."""
    compute_seconds: float
    tp_seconds: float
    """Like all that follows: only what nothing hides."""
    pp_seconds: float
    dp_seconds: float
    other_seconds: float
    """Sums at the end of a step, norm, clipping, optimizer."""
    bubble_seconds: float
    """In which the rank waits for others, if transfers took no time."""
    simulation: Simulation | None
    """The pipeline's part; None in an estimate."""


@dataclass(frozen=True)
class Training:
    """A whole training at a constant speed."""

    tokens: float
    days: float
    dollars: float | None
    """None where the hardware has no price."""


def step_time(config: Config, pipeline: PipelinePlan) -> StepTime:
    """The step of a resolved config whose pipeline is `pipeline`, every action simulated. Raises ConfigError where the hardware's speed is
    unknown."""
    step = Step(config, pipeline.stages, any(action.kind is Kind.INPUT_GRADIENT for actions in pipeline.schedule for action in actions))
    instant = simulate(pipeline.schedule, step.costs(transfer=0.0))
    transfer = step.transfer
    simulation = simulate(pipeline.schedule, step.costs(transfer)) if transfer else instant
    return step.result(simulation.step_seconds, instant.step_seconds, simulation)


def estimate(config: Config) -> StepTime:
    """The same by formula, without a schedule. A schedule from a file is simulated all the same."""
    parallel = config.parallel
    if parallel.schedule_is_file:
        return step_time(config, describe(config))
    ranks = stage_ranks(parallel.schedule, parallel.pp, int(parallel.stages_per_rank))
    stages = [StagePlan(rank, first, last, 0, 0) for rank, (first, last) in zip(ranks, stage_layers(config, ranks), strict=True)]
    step = Step(config, stages, parallel.schedule in ("zb_h1", "zb_v"))
    whole, instant = (
        pipeline_seconds(parallel.schedule, ranks, parallel.micro_batches, step.costs(transfer)) for transfer in (step.transfer, 0.0)
    )
    return step.result(whole, instant, None)


def training(config: Config, step: StepTime) -> Training:
    """Of `plan.tokens`, or else of train.max_steps."""
    tokens = config.plan.tokens or config.train.max_steps * config.batch_size * config.data.seq_len
    hours, price = tokens / step.tokens_per_second / 3600, config.hardware.dollars_per_device_hour
    return Training(tokens, hours / 24, None if price is None else hours * price * config.processes)


class Step:
    """The pieces of a step, priced."""

    def __init__(self, config: Config, stages: Sequence[StagePlan], splits: bool, times: Sequence[StageTime] | None = None) -> None:
        """splits: whether the schedule puts weight gradients off. times: of the stages, where they are known already."""
        self.config, self.stages, self.splits = config, stages, splits
        self.times = times or stage_times(config, [(stage.first_layer, stage.last_layer) for stage in stages])
        self.links = group_links(config)
        self.transfer = collective_seconds("send", 2, message_bytes(config), self.links["pp_up"]) if config.parallel.pp > 1 else 0.0

    def costs(self, transfer: float) -> Costs:
        """Of the pipeline's actions. Between stages of one rank nothing travels."""
        return Costs(
            [time.forward + time.forward_tp for time in self.times],
            [time.input_gradient + self._backward_tp(time) for time in self.times],
            [time.weight_gradient for time in self.times],
            transfer,
        )

    def result(self, pipeline: float, instant: float, simulation: Simulation | None) -> StepTime:
        """pipeline, instant: seconds of its actions with transfers, and if these took no time."""
        config, m = self.config, self.config.parallel.micro_batches
        compute, tp = [0.0] * config.parallel.pp, [0.0] * config.parallel.pp
        for stage, time in zip(self.stages, self.times, strict=True):
            compute[stage.rank] += m * (time.forward + time.backward)
            tp[stage.rank] += m * (time.forward_tp + self._backward_tp(time))
        busy = [sum(both) for both in zip(compute, tp, strict=True)]
        slowest = max(range(len(busy)), key=busy.__getitem__)
        dp, other = self.dp_seconds(), self.other_seconds()
        step = pipeline + dp + other
        tokens = config.batch_size * config.data.seq_len / step
        return StepTime(
            step_seconds=step,
            tokens_per_second=tokens,
            mfu=_mfu(config, tokens),
            bubble_fraction=1 - sum(busy) / (pipeline * len(busy)),
            compute_seconds=compute[slowest],
            tp_seconds=tp[slowest],
            pp_seconds=pipeline - instant,
            dp_seconds=dp,
            other_seconds=other,
            bubble_seconds=max(0.0, instant - busy[slowest]),
            simulation=simulation,
        )

    def _backward_tp(self, time: StageTime) -> float:
        return time.input_gradient_tp if self.splits else time.backward_tp

    def dp_seconds(self) -> float:
        """fully_shard's collectives, exposed.

        A stage's weights come with its first forward, and the stages begin one after another. Its gradients go with its last backward, and
        a rank's add to the step where they take longest. On a GPU one message a stage runs under nothing; on a CPU all do, as fully_shard
        waits for each there.
        """
        if int(self.config.parallel.dp) == 1:
            return 0.0
        gathered, reduced = [0.0] * self.config.parallel.pp, [0.0] * self.config.parallel.pp
        known: dict[tuple[int, bool, bool], tuple[float, float]] = {}  # stages of as many layers with the same ends are alike
        for stage, time in zip(self.stages, self.times, strict=True):
            kind = (stage.last_layer - stage.first_layer, stage.first_layer == 0, stage.last_layer == self.config.model.num_layers)
            if kind not in known:
                traffic = fully_shard_traffic(self.config, stage.first_layer, stage.last_layer)
                gathers, scatters = ([each for each in traffic if each.operation == name] for name in ("all_gather", "reduce_scatter"))
                known[kind] = self._exposed(gathers, time.forward), self._exposed(scatters, time.backward)
            gathered[stage.rank] += known[kind][0]
            reduced[stage.rank] += known[kind][1]
        return sum(gathered) + max(reduced)

    def _exposed(self, traffic: Sequence[Traffic], hidden_by: float) -> float:
        """Seconds of one stage's messages less those that run under its computation."""
        link, dp = self.links["dp"], int(self.config.parallel.dp)
        each = [(one.calls, collective_seconds(one.operation, dp, one.bytes // one.calls, link)) for one in traffic]
        whole = sum(calls * seconds for calls, seconds in each)
        if self.config.hardware.device == "cpu" or not all(one.under for one in traffic):
            return whole
        alone = max((seconds for _, seconds in each), default=0.0)
        return alone + max(0.0, whole - alone - hidden_by)

    def other_seconds(self) -> float:
        """What follows the last backward, and the batch's rows: of the slowest rank, which is the first or the last."""
        return max(self._update_seconds(rank) + self._sums_seconds(rank) for rank in {0, self.config.parallel.pp - 1})

    def _update_seconds(self, rank: int) -> float:
        mine = [stage for stage in self.stages if stage.rank == rank]
        kept = sum(rank_parameters(self.config, stage.first_layer, stage.last_layer) for stage in mine)
        return device_of(self.config).seconds(update_work(self.config, kept, kept * int(self.config.parallel.dp)))

    def _sums_seconds(self, rank: int) -> float:
        """What a rank calls once a step, but for fully_shard's."""
        stages = PipelinePlan(list(self.stages), [], Costs([], [], []))
        return sum(traffic_seconds(self.config, each, self.links) for each in once_traffic(self.config, stages, rank))


def _mfu(config: Config, tokens_per_second: float) -> float | None:
    peak = config.hardware.peak_flops_per_second
    return flops_per_token(config.model, config.data.seq_len) * tokens_per_second / (peak * config.processes) if peak else None
