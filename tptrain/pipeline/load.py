"""The schedule that a config names: made by a function of `schedules.py`, or read from a file; proved before any rank runs it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from tptrain.config import ConfigError, ParallelConfig, refuse
from tptrain.pipeline.actions import Kind, Schedule, ScheduleError, placement, with_transfers
from tptrain.pipeline.notation import loads
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs
from tptrain.pipeline.validate import check_computations, validate
from tptrain.pipeline.zero_bubble import zb_v


def load_schedule(parallel: ParallelConfig, costs: Costs | None = None) -> Schedule:
    """The schedule of a resolved config, with transfers. costs: of the stages, for a schedule that heeds them (zb_v).

    Raises ConfigError for a file that is missing, unreadable, of another layout than the config's, or no schedule that can run.
    """
    if parallel.schedule_is_file:
        schedule = _read(parallel)
    else:
        sizes = (parallel.pp, int(parallel.stages_per_rank), parallel.micro_batches)
        schedule = zb_v(*sizes, costs) if parallel.schedule == "zb_v" else SCHEDULES[parallel.schedule](*sizes)
    try:
        check_computations(schedule, parallel.micro_batches)
        complete = with_transfers(schedule)
        validate(complete, parallel.micro_batches)
    except ScheduleError as error:
        raise _refuse(parallel, f"cannot run ({error})") from error
    _check_places(parallel, placement(schedule))
    return complete


def _read(parallel: ParallelConfig) -> Schedule:
    """The file's schedule, of as many ranks, stages and micro-batches as the config asks for."""
    try:
        schedule = loads(Path(parallel.schedule).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _refuse(parallel, "is no file", "give the path of one") from error
    except OSError as error:
        raise _refuse(parallel, f"cannot be read ({error.strerror})", "give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise _refuse(parallel, f"is no UTF-8 text (byte {error.start})", "give the path of a text file") from error
    except ScheduleError as error:
        raise _refuse(parallel, f"is no schedule ({error})") from error
    forwards = [[action for action in actions if action.kind is Kind.FORWARD] for actions in schedule]
    each = [len({action.stage for action in actions}) for actions in forwards]
    micro_batches = len({action.micro_batch for actions in forwards for action in actions})
    if not schedule:
        raise _refuse(parallel, "holds no computation")
    if len(schedule) != parallel.pp:
        raise _refuse(parallel, f"holds {_count(len(schedule), 'rank')}, but parallel.pp={parallel.pp}", f"use parallel.pp={len(schedule)}")
    for rank, stages in enumerate(each):
        if stages != each[0]:
            raise _refuse(parallel, f"gives rank 0 {_count(each[0], 'stage')} and rank {rank} {stages}", "give every rank as many")
    if each[0] != int(parallel.stages_per_rank):
        rule = f"has {_count(each[0], 'stage')} a rank, but parallel.stages_per_rank={parallel.stages_per_rank}"
        raise _refuse(parallel, rule, f"use parallel.stages_per_rank={each[0]}" if each[0] else None)
    if micro_batches != parallel.micro_batches:
        rule = f"holds {_count(micro_batches, 'micro-batch')}, but parallel.micro_batches={parallel.micro_batches}"
        raise _refuse(parallel, rule, f"use parallel.micro_batches={micro_batches}")
    return schedule


def _check_places(parallel: ParallelConfig, ranks: list[int]) -> None:
    """Whether the batch's inputs and its targets are where the data is, on the first rank and, of targets, on it or the last; and
    whether neighbouring stages are where a connection is."""
    if ranks[0] != 0:
        raise _refuse(parallel, f"has stage 0 on rank {ranks[0]}, but the inputs are on rank 0", "give stage 0 to rank 0")
    if ranks[-1] not in (0, parallel.pp - 1):
        rule = f"has the last stage, {len(ranks) - 1}, on rank {ranks[-1]}, but the targets are on the first and the last rank"
        raise _refuse(parallel, rule, f"give it to rank 0 or {parallel.pp - 1}")
    for stage, (one, other) in enumerate(pairwise(ranks)):
        if (other - one) % parallel.pp not in (0, 1, parallel.pp - 1):
            rule = f"has stages {stage} and {stage + 1} on ranks {one} and {other}, which are no neighbours on the ring of ranks"
            raise _refuse(parallel, rule, "give them to neighbours")


def _refuse(parallel: ParallelConfig, rule: str, remedy: str | None = None) -> ConfigError:
    """remedy: what would do beside a schedule that has a name."""
    return refuse("parallel.schedule", parallel.schedule, rule, f"{remedy or 'mend the file'}, or use one of {', '.join(SCHEDULES)}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"
