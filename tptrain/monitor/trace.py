"""`traces/step-00000005.json`: what each rank computed when in one step, in the trace event format of Chrome.

https://ui.perfetto.dev and chrome://tracing open such a file: each rank is a process, each computation a block on its line.

    {"displayTimeUnit": "ms",
     "traceEvents": [
       {"ph": "M", "name": "process_name", "pid": 3, "tid": 0, "args": {"name": "rank 3 (pp 1, dp 0, tp 1)"}}, ...
       {"ph": "X", "name": "1F5", "cat": "forward", "pid": 3, "tid": 0, "ts": 1250.5, "dur": 803.25, "args": {"stage": 1, ...}}, ...],
     "tptrain": {"step": 5, "layout": {"tp": 2, "pp": 2, "dp": 1}, "schedule": "1f1b", ..., "ranks": [{"rank": 0, "pp": 0, ...}, ...]}}

ts and dur are microseconds, to the nanosecond, since the moment at which the ranks began the step together. Ranks of one machine share
its clock; between machines that moment is as exact as the collective that let them begin.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tptrain.files import write_atomically
from tptrain.pipeline.actions import Action, Kind
from tptrain.pipeline.timeline import Span, Timeline

PlainSpan = tuple[str, int, int, float, float]
"""A span as any process can read it: kind (F, B, I or W), stage, micro-batch, start and end in seconds."""

_MICROSECONDS = 1e6
_TO_THE_NANOSECOND = 3


class RankSpans(NamedTuple):
    """One rank's place in the layout, and what it computed when."""

    rank: int
    pp: int
    dp: int
    tp: int
    spans: list[PlainSpan]

    @property
    def timeline(self) -> list[Span]:
        """The spans in the pipeline's own type."""
        return [Span(Action(Kind(kind), stage, micro_batch), start, end) for kind, stage, micro_batch, start, end in self.spans]


@dataclass(frozen=True)
class Trace:
    """A traced step, read back."""

    step: int
    ranks: list[RankSpans]
    """By rank."""
    facts: dict[str, Any]
    """What the writer said of the run: layout, schedule, micro_batches."""

    def pipeline(self, dp: int = 0, tp: int = 0) -> Timeline:
        """The timeline of the ranks that share one copy of the model and hold the same slice of its layers, first to last."""
        return [each.timeline for each in sorted(self.ranks, key=lambda each: each.pp) if (each.dp, each.tp) == (dp, tp)]


class Recorded(NamedTuple):
    """One rank's spans on its own clock."""

    clock: str
    """`clock_name()`."""
    zero: float
    """When the step began on this rank."""
    rank: RankSpans


def clock_name() -> str:
    """Names the clock behind `time.perf_counter`: processes on one running system share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def clock_number(name: str) -> int:
    """A number below 2^48 for a clock's name, so that ranks can compare names by exchanging floating-point numbers."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")


def plain_spans(spans: Sequence[Span]) -> list[PlainSpan]:
    """Spans as they travel to the rank that writes."""
    return [(kind.value, stage, micro_batch, start, end) for (kind, stage, micro_batch), start, end in spans]


def on_one_clock(recorded: Sequence[Recorded]) -> list[RankSpans]:
    """All ranks' spans since the step's beginning. On each clock that is when the first of its ranks began."""
    zeros: dict[str, float] = {}
    for each in recorded:
        zeros[each.clock] = min(each.zero, zeros.get(each.clock, each.zero))
    return [
        each.rank._replace(
            spans=[
                (kind, stage, micro_batch, start - zeros[each.clock], end - zeros[each.clock])
                for kind, stage, micro_batch, start, end in each.rank.spans
            ]
        )
        for each in recorded
    ]


def write_trace(run_dir: Path, step: int, ranks: Sequence[RankSpans], facts: Mapping[str, Any]) -> Path:
    """Write the trace of a step, of all ranks, atomically. Returns its path.

    facts: what `Trace.facts` keeps; it may hold anything that JSON can, except the keys step and ranks.
    """
    places = [{"rank": each.rank, "pp": each.pp, "dp": each.dp, "tp": each.tp} for each in ranks]
    trace = {
        "displayTimeUnit": "ms",
        "traceEvents": [*_names(ranks), *(event for each in ranks for event in _events(each))],
        "tptrain": {"step": step, **facts, "ranks": places},
    }
    path = run_dir / "traces" / f"step-{step:08d}.json"
    write_atomically(path, json.dumps(trace, allow_nan=False).encode())
    return path


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises ValueError, in one line, where it is none that `write_trace` wrote, and OSError."""
    try:
        trace = json.loads(path.read_bytes())
        facts = dict(trace["tptrain"])
        step, places = int(facts.pop("step")), facts.pop("ranks")
        spans: dict[int, list[PlainSpan]] = {place["rank"]: [] for place in places}
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                spans[event["pid"]].append(_span(event))
        ranks = [RankSpans(place["rank"], place["pp"], place["dp"], place["tp"], spans[place["rank"]]) for place in places]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no trace of tptrain ({type(error).__name__}: {' '.join(str(error).split())})") from error
    return Trace(step, sorted(ranks), facts)


def find_traces(run_dir: Path) -> dict[int, Path]:
    """The traces of a run by step, oldest first."""
    found = {int(path.stem.removeprefix("step-")): path for path in (run_dir / "traces").glob("step-*.json") if _NAME.fullmatch(path.name)}
    return dict(sorted(found.items()))


_NAME = re.compile(r"step-\d+\.json")


def _names(ranks: Sequence[RankSpans]) -> list[dict[str, Any]]:
    """What a viewer calls each rank, and where it shows it: the ranks of a pipeline below each other, first stage on top."""
    order = {each.rank: place for place, each in enumerate(sorted(ranks, key=lambda each: (each.dp, each.tp, each.pp)))}
    events = []
    for each in ranks:
        name = f"rank {each.rank} (pp {each.pp}, dp {each.dp}, tp {each.tp})"
        for what, args in (
            ("process_name", {"name": name}),
            ("process_sort_index", {"sort_index": order[each.rank]}),
            ("thread_name", {"name": "computations"}),
        ):
            events.append({"ph": "M", "name": what, "pid": each.rank, "tid": 0, "args": args})
    return events


def _events(rank: RankSpans) -> list[dict[str, Any]]:
    """The complete events of one rank, in the order in which they started."""
    events = []
    for span in sorted(rank.timeline, key=lambda span: span.start):
        action = span.action
        start, end = _microseconds(span.start), _microseconds(span.end)  # both rounded, so that neighbours still do not overlap
        events.append({
            "ph": "X", "name": str(action), "cat": action.kind.name.lower().replace("_", " "), "pid": rank.rank, "tid": 0,
            "ts": start, "dur": round(end - start, _TO_THE_NANOSECOND),
            "args": {"stage": action.stage, "micro_batch": action.micro_batch, "kind": action.kind.value},
        })  # fmt: skip
    return events


def _microseconds(seconds: float) -> float:
    return round(seconds * _MICROSECONDS, _TO_THE_NANOSECOND)


def _span(event: Mapping[str, Any]) -> PlainSpan:
    args = event["args"]
    end = round(event["ts"] + event["dur"], _TO_THE_NANOSECOND)
    return Kind(args["kind"]).value, args["stage"], args["micro_batch"], event["ts"] / _MICROSECONDS, end / _MICROSECONDS
