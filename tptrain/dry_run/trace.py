"""The dry run: one real step of chosen ranks without values, held against the plan.

Each rank has a process of its own, which ends with it, two at a time: a fake process group stays where it was made.

A step of many micro-batches repeats itself once the pipeline is full. So the step that runs has only so many of them that every rank
keeps as many activations at a time as in the whole step; the plan that it is held against is of that shorter step too.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from tptrain.config import Config, refuse
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.plan.communication import Totals, by_exchange, merged, step_traffic
from tptrain.plan.memory import rank_memory
from tptrain.plan.pipeline import PipelinePlan, describe

_AT_A_TIME = 2


@dataclass(frozen=True)
class TracedRank:
    """What a rank did in one step beside what the plan says of it."""

    rank: int
    """Over the whole job: the first tp and dp rank of its pipeline rank."""
    pp_rank: int
    micro_batches: int
    """Of the step that ran."""
    planned: Totals
    """Calls and bytes of a step by group and operation."""
    traced: Totals
    planned_peak_bytes: int
    """Of tensors, as the kernels of a CPU keep them, which run here whatever the config's device."""
    traced_peak_bytes: int
    seconds: float
    """That the dry run took."""

    @property
    def same_calls(self) -> bool:
        """Whether plan and step agree, to the byte."""
        return self.planned == self.traced

    def record(self) -> dict[str, Any]:
        """The same as JSON, with a list of [group, operation, calls, bytes] for each of planned and traced."""
        listed = {name: [[*key, *value] for key, value in getattr(self, name).items()] for name in ("planned", "traced")}
        return vars(self) | listed | {"same_calls": self.same_calls}


class TraceError(RuntimeError):
    """The process of a dry run was ended from outside."""


def trace(config: Config) -> list[TracedRank]:
    """Run one step of the pipeline rank that plan.trace_rank names, or of each one.

    config: resolved. Raises ConfigError where there is no such rank, and TraceError where a process was killed.
    """
    pp, chosen = config.parallel.pp, config.plan.trace_rank
    if chosen is not None and chosen >= pp:
        raise refuse("plan.trace_rank", chosen, f"is not below parallel.pp={pp}", f"use 0 to {pp - 1}, or null")
    pp_ranks = range(pp) if chosen is None else [chosen]
    config, pipeline = shortened(config)
    memory = rank_memory(replace(config, hardware=replace(config.hardware, device="cpu")), pipeline)
    stride = config.parallel.tp * int(config.parallel.dp)
    context = multiprocessing.get_context("forkserver")  # one import of torch serves all
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "tptrain.dry_run.step"])
    with ProcessPoolExecutor(_AT_A_TIME, context, _end_with_command, max_tasks_per_child=1) as pool:
        running = [pool.submit(_count, config, pp_rank * stride) for pp_rank in pp_ranks]
        try:
            counted = [each.result() for each in running]
        except BrokenProcessPool as error:
            raise TraceError("the process of a dry run was killed, perhaps for want of memory") from error
    return [
        TracedRank(
            pp_rank * stride, pp_rank, config.parallel.micro_batches, planned_totals(config, pipeline, pp_rank), totals,
            memory[pp_rank].total, peak, seconds,
        )
        for pp_rank, (totals, peak, seconds) in zip(pp_ranks, counted, strict=True)
    ]  # fmt: skip


def shortened(config: Config) -> tuple[Config, PipelinePlan]:
    """The config with no more micro-batches than fill the pipeline: the fewest, in multiples of pp from 2 pp on, with which every rank has
    as many live activations as with all. A schedule from a file stays as it is.
    """
    whole = describe(config)
    if config.parallel.schedule not in SCHEDULES:
        return config, whole
    for micro_batches in range(2 * config.parallel.pp, config.parallel.micro_batches, config.parallel.pp):
        shorter = copy.deepcopy(config)
        shorter.parallel.micro_batches = micro_batches
        shorter.train.global_batch_size = micro_batches * config.parallel.micro_batch_size * int(config.parallel.dp)
        pipeline = describe(shorter)
        if pipeline.peaks == whole.peaks:
            return shorter, pipeline
    return config, whole


def planned_totals(config: Config, pipeline: PipelinePlan, pp_rank: int, dp_rank: int = 0, tp_rank: int = 0) -> Totals:
    """The plan's calls and bytes as a rank on the config's device makes them."""
    traffic = step_traffic(config, pipeline, pp_rank, dp_rank, tp_rank)
    return merged(traffic if config.hardware.device == "cuda" else by_exchange(config, traffic))


def _end_with_command() -> None:
    """Have this process end when the command is killed, and not only after its step."""
    command = multiprocessing.parent_process()
    assert command is not None

    def wait() -> None:
        command.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _count(config: Config, rank: int) -> tuple[Totals, int, float]:
    from tptrain.dry_run.step import count_step

    counted = count_step(config, rank)
    return counted.totals, counted.peak_bytes, counted.seconds
