"""Traces: what Chrome's trace event format asks for, and that they read back."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tptrain.monitor.trace import RankSpans, Recorded, clock_name, find_traces, on_one_clock, plain_spans, read_trace, write_trace
from tptrain.pipeline.actions import Action, Kind
from tptrain.pipeline.timeline import Span

FACTS = {"layout": {"tp": 2, "pp": 2, "dp": 1}, "schedule": "zb_h1", "micro_batches": 2}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
NANOSECOND = 1e-9


def ranks() -> list[RankSpans]:
    """Four ranks, tp=2 x pp=2, that compute all kinds for durations with no short decimal form, each after the one before."""
    made = []
    for rank in range(4):
        pp, tp = divmod(rank, 2)
        spans, now = [], rank / 700
        for number, (kind, micro_batch) in enumerate([("F", 0), ("F", 1), ("B", 0), ("I", 1), ("W", 1)]):
            start, now = now + number / 7e5, now + (number + 1) / 300
            spans.append((kind, pp, micro_batch, start, now))
        made.append(RankSpans(rank, pp, 0, tp, spans))
    return made


def written(folder: Path) -> dict:
    return json.loads(write_trace(folder, 5, ranks(), FACTS).read_text())


def test_a_trace_reads_back(tmp_path: Path) -> None:
    path = write_trace(tmp_path, 5, list(reversed(ranks())), FACTS)
    assert path == tmp_path / "traces" / "step-00000005.json"
    trace = read_trace(path)
    assert (trace.step, trace.facts) == (5, FACTS)
    assert [each[:4] for each in trace.ranks] == [(0, 0, 0, 0), (1, 0, 0, 1), (2, 1, 0, 0), (3, 1, 0, 1)]
    for read, given in zip(trace.ranks, ranks(), strict=True):
        assert [span[:3] for span in read.spans] == [span[:3] for span in given.spans]
        for got, want in zip(read.spans, given.spans, strict=True):
            assert got[3:] == pytest.approx(want[3:], rel=0, abs=NANOSECOND)
    assert [[span.action for span in spans] for spans in trace.pipeline(tp=1)] == [
        [span.action for span in ranks()[rank].timeline] for rank in (1, 3)
    ]
    assert trace.pipeline(tp=1)[1][0].start == pytest.approx(3 / 700, abs=NANOSECOND)
    assert trace.pipeline(dp=1) == []


def test_events_are_those_of_the_format(tmp_path: Path) -> None:
    """Complete events ("X") have a timestamp and a duration in microseconds, metadata events ("M") the names of processes."""
    trace = written(tmp_path)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M"}
    assert all(isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["name"] for event in events)
    for given in ranks():
        complete = [event for event in events if event["ph"] == "X" and event["pid"] == given.rank]
        assert [event["name"] for event in complete] == [f"{stage}{kind}{micro_batch}" for kind, stage, micro_batch, _, _ in given.spans]
        for event, (kind, stage, micro_batch, start, end) in zip(complete, given.spans, strict=True):
            assert event["cat"] == NAMES[kind]
            assert (event["args"]["stage"], event["args"]["micro_batch"]) == (stage, micro_batch)
            assert event["ts"] == pytest.approx(1e6 * start, rel=0, abs=1e-3)
            assert event["dur"] == pytest.approx(1e6 * (end - start), rel=0, abs=2e-3)


def test_processes_are_named_and_a_pipeline_s_ranks_stand_together(tmp_path: Path) -> None:
    metadata = [event for event in written(tmp_path)["traceEvents"] if event["ph"] == "M"]
    names = {event["pid"]: event["args"]["name"] for event in metadata if event["name"] == "process_name"}
    assert names == {
        0: "rank 0 (pp 0, dp 0, tp 0)",
        1: "rank 1 (pp 0, dp 0, tp 1)",
        2: "rank 2 (pp 1, dp 0, tp 0)",
        3: "rank 3 (pp 1, dp 0, tp 1)",
    }
    place = {event["pid"]: event["args"]["sort_index"] for event in metadata if event["name"] == "process_sort_index"}
    assert sorted(place, key=place.__getitem__) == [0, 2, 1, 3]


def test_blocks_of_a_rank_are_in_order_and_do_not_overlap(tmp_path: Path) -> None:
    """Else a viewer nests one in the other; also where spans touch between two nanoseconds, and come in another order."""
    edges = [n * 1e-6 / 7 for n in range(50)]
    spans = [("F", 0, n, start, end) for n, (start, end) in enumerate(pairwise(edges))]
    path = write_trace(tmp_path, 1, [RankSpans(0, 0, 0, 0, spans[::-1])], FACTS)
    complete = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert [event["args"]["micro_batch"] for event in complete] == list(range(49))
    for before, after in pairwise(complete):
        assert before["dur"] > 0
        assert round(1000 * before["ts"]) + round(1000 * before["dur"]) == round(1000 * after["ts"]), "in whole nanoseconds"


def test_spans_travel_as_plain_tuples() -> None:
    spans = [Span(Action(Kind.WEIGHT_GRADIENT, 3, 7), 1000.25, 1000.5)]
    assert plain_spans(spans) == [("W", 3, 7, 1000.25, 1000.5)]
    assert RankSpans(0, 0, 0, 0, plain_spans(spans)).timeline == spans


def test_ranks_of_a_machine_share_its_first_zero() -> None:
    """Rank 1 noted the time a quarter of a second after rank 0 of the same machine; rank 2's machine counts from elsewhere."""
    beginnings = [("a", 100.0, 100.5), ("a", 100.25, 100.75), ("b", 7.0, 7.5)]
    recorded = [
        Recorded(clock, zero, RankSpans(n, n, 0, 0, [("F", n, 0, start, start + 1)])) for n, (clock, zero, start) in enumerate(beginnings)
    ]
    shared = on_one_clock(recorded)
    assert [each.spans for each in shared] == [[("F", n, 0, start, start + 1)] for n, start in enumerate([0.5, 0.75, 0.5])]
    assert [each[:4] for each in shared] == [(n, n, 0, 0) for n in range(3)]


def test_processes_of_a_machine_name_the_same_clock() -> None:
    child = "import tptrain.monitor.trace as t; print(t.clock_name())"
    said = subprocess.run([sys.executable, "-c", child], check=True, capture_output=True, text=True).stdout
    assert said.strip() == clock_name() != ""


def test_traces_are_found_by_step(tmp_path: Path) -> None:
    assert find_traces(tmp_path) == {}
    paths = {step: write_trace(tmp_path, step, ranks(), FACTS) for step in (12, 5, 123456789)}
    for name in ("step-x.json", "other.json", ".step-00000007.json.1.tmp"):
        (tmp_path / "traces" / name).write_text("{}")
    assert list(find_traces(tmp_path).items()) == [(5, paths[5]), (12, paths[12]), (123456789, paths[123456789])]


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "{}", '{"traceEvents": [], "tptrain": 3}', '{"traceEvents": [{"ph": "X"}], "tptrain": {}}']
)
def test_what_is_no_trace_of_ours_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^\S+trace.json is no trace of tptrain \(.+\)$"):
        read_trace(path)


def test_a_foreign_event_is_no_trace_of_ours(tmp_path: Path) -> None:
    trace = written(tmp_path)
    trace["traceEvents"][-1]["args"]["kind"] = "Z"
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    with pytest.raises(ValueError, match="is no trace of tptrain"):
        read_trace(tmp_path / "trace.json")
