"""What `tptrain plan` says of one layout, as tables and lines; and the schedule as a file, with the keys that go with it."""

from __future__ import annotations

from dataclasses import fields

from rich.table import Table

from tptrain.config import Config
from tptrain.pipeline.notation import dumps
from tptrain.plan.forecast import Forecast
from tptrain.plan.memory import RankMemory
from tptrain.plan.pipeline import PipelinePlan
from tptrain.plan.time import StepTime
from tptrain.plan.units import as_bytes, as_count, as_days, as_seconds, percent

LABEL = 12
"""Columns of the labels of lines."""


def stage_table(described: PipelinePlan) -> Table:
    """A row a stage."""
    rows = table("stage", "rank", "layers", "parameters", "forward FLOPs")
    whole = sum(stage.forward_flops_per_token for stage in described.stages)
    for number, stage in enumerate(described.stages):
        first, last = stage.first_layer, stage.last_layer - 1
        layers = f"{first}" if first == last else f"{first}-{last}"
        share = stage.forward_flops_per_token / whole
        rows.add_row(f"{number}", f"{stage.rank}", layers, f"{stage.parameters:,}", f"{100 * share:.1f} %")
    return rows


def memory_table(ranks: list[RankMemory]) -> Table:
    """A row a pipeline rank, what each component takes, and the sum."""
    names = [name for name in components(ranks[0]) if any(components(rank)[name] for rank in ranks)]
    rows = table("rank", *names, "in all", title="memory of a rank")
    for rank in ranks:
        rows.add_row(f"{rank.pp_rank}", *(as_bytes(components(rank)[name]) for name in names), as_bytes(rank.total))
    return rows


def components(rank: RankMemory) -> dict[str, int]:
    """Bytes by what they are for."""
    return {field.name: getattr(rank, field.name) for field in fields(rank) if field.name != "pp_rank"}


def traffic_table(forecast: Forecast) -> Table | None:
    """A row a group and operation: of the pipeline rank that sends most over it, in one step. None where nothing is sent."""
    most: dict[tuple[str, str], tuple[int, int, float | None, int]] = {}
    for rank, traffic in enumerate(forecast.traffic):
        for key in dict.fromkeys((each.group, each.operation) for each in traffic if each.calls):
            mine = [each for each in traffic if (each.group, each.operation) == key]
            sent, each_takes = sum(each.bytes for each in mine), [forecast.seconds(each) for each in mine]
            if sent > most.get(key, (0, -1, 0, 0))[1]:
                known = [seconds for seconds in each_takes if seconds is not None]
                most[key] = (sum(each.calls for each in mine), sent, sum(known) if len(known) == len(each_takes) else None, rank)
    if not most:
        return None
    rows = table("group", "operation", "calls", "bytes", "seconds", "rank", title="communication of a step, of the rank with most of it")
    for (group, operation), (calls, sent, seconds, rank) in most.items():
        rows.add_row(
            group_of(group), operation, f"{calls:,}", as_bytes(sent), "unknown" if seconds is None else as_seconds(seconds), f"{rank}"
        )
    return rows


def group_of(name: str) -> str:
    """The words for a group of `Traffic`."""
    return {"pp_up": "pp, to later ranks", "pp_down": "pp, to earlier ranks"}.get(name, name)


def facts(forecast: Forecast) -> list[tuple[str, str]]:
    """What holds of the whole job, as (label, value)."""
    config, described = forecast.config, forecast.pipeline
    parallel = config.parallel
    micro_batches = f"{parallel.micro_batches} micro-batch{'es' * (parallel.micro_batches > 1)}"
    peaks = " ".join(map(str, described.peaks))
    processes = f"{config.processes} process{'es' * (config.processes > 1)}"
    return [
        ("layout", f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp} = {processes}"),
        ("schedule", f"{parallel.schedule}, {micro_batches}"),
        ("bubble", f"{100 * described.bubble_fraction:.1f} % of the ranks' time, by FLOPs"),
        ("activations", f"at most {peaks} live, rank by rank; one is what a stage keeps of a micro-batch"),
        ("memory", memory_line(forecast)),
        *time_lines(forecast),
    ]


def memory_line(forecast: Forecast) -> str:
    """Whether the fullest rank fits."""
    fullest, device, missing = forecast.fullest, forecast.config.hardware.memory_bytes, forecast.missing_bytes
    needs = f"rank {fullest.pp_rank} needs most, {as_bytes(fullest.total)}"
    if device is None or missing is None:
        return f"{needs}; whether that fits is unknown: set hardware.memory_bytes, or use hardware=h100 or another that says it"
    if missing:
        return f"{needs}: does not fit into the device's {as_bytes(device)}, {as_bytes(missing)} are missing"
    return f"{needs}: fits into the device's {as_bytes(device)}"


def time_lines(forecast: Forecast) -> list[tuple[str, str]]:
    """The step, the speed and the whole training."""
    time, training = forecast.time, forecast.training
    if isinstance(time, str) or training is None:
        return [("step", f"unknown, as {time}")]
    mfu = f"MFU {percent(time.mfu)}" if time.mfu is not None else "MFU unknown: set hardware.peak_flops_per_second"
    parts = ", ".join(f"{name} {as_seconds(seconds)}" for name, seconds in parts_of(time).items() if seconds)
    cost = "" if training.dollars is None else f", {as_count(training.dollars)} dollars"
    return [
        ("step", f"{as_seconds(time.step_seconds)}: {parts}; bubble {percent(time.bubble_fraction)} of the ranks' time"),
        ("speed", f"{time.tokens_per_second:,.0f} tokens/s, {mfu}"),
        ("training", f"{as_count(training.tokens)} tokens in {as_days(training.days)}{cost}"),
    ]


def parts_of(time: StepTime) -> dict[str, float]:
    """Seconds of a step by what the rank that computes longest spends them on; they add up to the step."""
    return {
        "compute": time.compute_seconds, "tp": time.tp_seconds, "pp": time.pp_seconds, "dp": time.dp_seconds,
        "bubble": time.bubble_seconds, "other": time.other_seconds,
    }  # fmt: skip


def schedule_file(config: Config, described: PipelinePlan) -> str:
    """The schedule as `parallel.schedule=FILE` takes it, below the keys that must be set beside it."""
    keys = [f"parallel.{key}={getattr(config.parallel, key)}" for key in ("pp", "stages_per_rank", "micro_batches")]
    return f"# {' '.join(keys)}\n{dumps(described.schedule)}"


def table(*headings: str, title: str | None = None) -> Table:
    """An empty one with these columns."""
    made = Table(title=title, title_justify="left")
    for heading in headings:
        made.add_column(heading, justify="right")
    return made
