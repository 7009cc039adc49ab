"""What a run says of itself that needs several ranks: the measured bubble, and the trace of a step."""

from __future__ import annotations

import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tptrain.report
from tests.ranks import run_ranks
from tests.support import small_config
from tptrain.config import Config
from tptrain.data import prepare
from tptrain.data.dataset import Data
from tptrain.data_config import MixturePart, SourceConfig
from tptrain.mesh import build_mesh
from tptrain.monitor.metrics import read_metrics
from tptrain.monitor.trace import find_traces, read_trace
from tptrain.pipeline.actions import Action, Kind
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.timeline import Span
from tptrain.report import Report
from tptrain.train import train
from tptrain.trainer import StepResult

RESULT = StepResult(torch.tensor([4.0, 6.0, 3.0], dtype=torch.float64), lr=0.5)


def spans_of(rank: int) -> list[Span]:
    """Rank 0 computes 3 of 5 seconds, rank 1 all of 2 on a clock of its own: 5 of the 10 seconds of both."""
    clock = (100.0, 5000.0)[rank]
    times = [[(0, 1), (3, 5)], [(0, 0.5), (0.5, 2)]][rank]
    kinds = (Kind.FORWARD, Kind.BACKWARD)
    return [Span(Action(kind, rank, 0), clock + start, clock + end) for kind, (start, end) in zip(kinds, times, strict=True)]


def report_of(config: Config, folder: Path) -> Report:
    """A report without a model to speak of."""
    trainer = SimpleNamespace(
        share=torch.nn.Linear(3, 2 + torch.distributed.get_rank()),
        steps_done=0,
        evaluation_due=False,
        data=Data.of_tokens(config, np.arange(100)),
    )
    mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
    return Report(config, mesh, trainer, folder)  # type: ignore[arg-type]


def test_the_bubble_is_of_all_ranks_whatever_their_clocks(tmp_path: Path) -> None:
    run_ranks(2, log_steps, tmp_path)
    measured, unknown, together = read_metrics(tmp_path)
    assert measured["bubble_fraction"] == pytest.approx(1 - 5 / 10)
    assert unknown["bubble_fraction"] is None
    assert [each["data_wait_fraction"] for each in (measured, unknown, together)] == pytest.approx([0.05 / 0.25] * 3), (
        "of the rank that waits most"
    )
    assert together["bubble_fraction"] == pytest.approx(1 - 5 / (2 * 4902)), "on one clock: from 100 to 5002"
    assert all(isinstance(record["peak_memory_bytes"], int) and record["peak_memory_bytes"] > 2**20 for record in (measured, unknown))


def log_steps(rank: int, folder: Path) -> None:
    tptrain.report.clock_name = lambda: f"machine {rank}"
    report = report_of(small_config(parallel__pp=2), folder)
    assert report.gather([rank + 2**40, 0.5]) == [[2**40, 0.5], [2**40 + 1, 0.5]]
    report.step(1, RESULT, 0.25, [0.05, 0.01][rank], 8, spans_of(rank))
    report.step(2, RESULT, 0.25, [0.05, 0.01][rank], 16, [])
    tptrain.report.clock_name = lambda: "one machine"
    report.step(3, RESULT, 0.25, [0.05, 0.01][rank], 24, spans_of(rank))
    report.close()


def test_a_trace_has_all_ranks_on_one_clock(tmp_path: Path) -> None:
    run_ranks(2, trace_steps, tmp_path)
    assert list(find_traces(tmp_path)) == [4], "nothing is written of a step without spans"
    trace = read_trace(find_traces(tmp_path)[4])
    assert trace.facts == {"layout": {"tp": 1, "pp": 2, "dp": 1}, "schedule": "1f1b", "micro_batches": 4}
    for rank, clock in ((0, 100.0), (1, 5000.0)):
        expected = [(each.action, each.start - clock, each.end - clock) for each in spans_of(rank)]
        for span, (action, start, end) in zip(trace.pipeline()[rank], expected, strict=True):
            assert span.action == action
            assert (span.start, span.end) == pytest.approx((start, end), abs=1e-9)


def trace_steps(rank: int, folder: Path) -> None:
    report = report_of(small_config(parallel__pp=2), folder)
    on_own_machine(rank)
    report.trace(3, [], 0.0)
    report.trace(4, spans_of(rank), (100.0, 5000.0)[rank])
    report.close()


def on_own_machine(rank: int) -> None:
    """Pretend, in this process, that its clock is no other rank's."""
    tptrain.report.clock_name = lambda: f"machine {rank}"


def test_ranks_begin_a_traced_step_together(tmp_path: Path) -> None:
    """The zeros of ranks on one machine, which share its clock, are close though one came late."""
    zeros = run_ranks(2, begin_late, tmp_path)
    assert abs(zeros[0] - zeros[1]) < 0.2


def begin_late(rank: int, folder: Path) -> float:
    report = report_of(small_config(parallel__pp=2, train__trace_steps=[2]), folder)
    assert report.common_zero(1) is None
    time.sleep(0.5 * rank)
    zero = report.common_zero(2)
    assert zero is not None
    report.close()
    return zero


def test_a_training_traces_the_steps_that_it_should(tmp_path: Path) -> None:
    """With the engine's own spans, on ranks whose clocks differ."""
    changes = {"data__vocab_size": 64, "data__num_sequences": 64, "data__store_dir": str(tmp_path / "stores")}
    config = small_config(parallel__pp=2, train__trace_steps=[2, 9], train__max_steps=3, train__eval_steps=0, **changes)
    run_ranks(2, train_on_own_clock, config, tmp_path / "run", prepare(config))
    assert list(find_traces(tmp_path / "run")) == [2]
    timeline = read_trace(find_traces(tmp_path / "run")[2]).pipeline()
    for spans, actions in zip(timeline, SCHEDULES["1f1b"](2, 1, 4), strict=True):
        assert [span.action for span in spans] == actions
        assert spans[0].start >= 0
        assert spans[-1].end < 30, "since this rank's own zero"
        assert all(before.start < before.end <= after.start for before, after in pairwise(spans))
    records = read_metrics(tmp_path / "run")
    assert len(records) == 3
    assert all(0 < record["bubble_fraction"] < 1 for record in records)


def test_on_one_machine_nothing_runs_before_what_it_needs(tmp_path: Path) -> None:
    """Exactly, however late a rank heard that the step begins."""
    changes = {"data__vocab_size": 64, "data__num_sequences": 64, "data__store_dir": str(tmp_path / "stores")}
    config = small_config(parallel__pp=2, train__trace_steps=[1, 2, 3], train__max_steps=3, train__eval_steps=0, **changes)
    run_ranks(2, train_and_hear_late, config, tmp_path / "run", prepare(config))
    for path in find_traces(tmp_path / "run").values():
        spans = {span.action: span for spans in read_trace(path).pipeline() for span in spans}
        for micro_batch in range(4):
            forwards = [spans[Action(Kind.FORWARD, stage, micro_batch)] for stage in (0, 1)]
            backwards = [spans[Action(Kind.BACKWARD, stage, micro_batch)] for stage in (1, 0)]
            chain = [*forwards, *backwards]
            assert all(before.end <= after.start for before, after in pairwise(chain)), path


def train_and_hear_late(rank: int, config: Config, run_dir: Path, store_dir: Path) -> None:
    common_zero = Report.common_zero

    def late(report: Report, step: int) -> float | None:
        zero = common_zero(report, step)
        if rank == 1 and zero is not None:
            time.sleep(0.02)
            zero = time.perf_counter()
        return zero

    Report.common_zero = late  # type: ignore[method-assign]
    train(config, run_dir, store_dir)


def train_on_own_clock(rank: int, config: Config, run_dir: Path, store_dir: Path) -> None:
    on_own_machine(rank)
    clock = time.perf_counter
    time.perf_counter = lambda: clock() + 1000 * rank  # type: ignore[assignment]
    train(config, run_dir, store_dir)


def test_a_mixture_is_reported_source_by_source(tmp_path: Path) -> None:
    """Two sources and a further validation set, through the files and the terminal, on ranks that share the reading."""
    config = small_config(data__store_dir=str(tmp_path / "stores"), parallel__tp=2, train__max_steps=3, train__eval_every=2)
    config.data = replace(
        config.data, source="mixture", val_sets={"noise": SourceConfig("memorize", num_sequences=5, vocab_size=50)},
        mixture={name: MixturePart("memorize", num_sequences=30, vocab_size=size, weight=weight)
                 for name, size, weight in (("many", 200, 3.0), ("few", 10, 1.0))},
    )  # fmt: skip
    shown, silent = run_ranks(2, train_all, config, tmp_path / "run", prepare(config))
    records = read_metrics(tmp_path / "run")
    evaluations = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in evaluations] == [2, 3]
    for record in evaluations:
        assert list(record)[3:] == ["val_loss/many", "val_loss/few", "val_loss/noise"]
        assert record["val_loss"] == pytest.approx(0.75 * record["val_loss/many"] + 0.25 * record["val_loss/few"])
    assert evaluations[-1]["val_loss/few"] < evaluations[-1]["val_loss/many"], "ten ids are guessed sooner than 200"
    assert all(0 <= record["data_wait_fraction"] < 1 for record in records if "loss" in record)
    assert not silent
    assert "data        mixture: 962 tokens, 962 held out, 81 in noise\n" in shown
    assert shown.count("few 25.0 % 0.2 epochs, many 75.0 % 0.6 epochs\n") == 2, "24 samples: 6 and 18 of 30, foretold and read"


def train_all(rank: int, config: Config, run_dir: Path, store_dir: Path) -> str:
    """What this rank prints."""
    with redirect_stdout(StringIO()) as shown:
        train(config, run_dir, store_dir)
    return shown.getvalue()
