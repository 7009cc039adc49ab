"""The dry run: one real step of each pipeline rank on tensors without values, against the plan."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from rich.console import Console

from tests.support import small_config
from tptrain.config import ConfigError
from tptrain.dry_run.show import call_table, facts
from tptrain.dry_run.trace import shortened, trace
from tptrain.plan.pipeline import describe

pytestmark = pytest.mark.timeout(600)

LARGE = {
    "model__hidden_size": 256, "model__ffn_hidden_size": 1024, "model__num_heads": 8, "model__vocab_size": 4096, "model__num_layers": 8,
    "model__max_seq_len": 256, "data__seq_len": 256, "train__precision": "bf16",
}  # fmt: skip


def test_a_gpu_s_step_of_512_ranks_is_the_plan() -> None:
    """Sequence parallelism, recomputation, interleaved stages and dp, with the route of a GPU and none at hand."""
    config = small_config(
        parallel__tp=4, parallel__pp=4, parallel__dp=32, parallel__sequence_parallel=True, parallel__recompute="selective",
        parallel__schedule="interleaved", parallel__stages_per_rank=2, train__global_batch_size=2 * 32 * 40, **LARGE,
    )  # fmt: skip
    config.hardware.device = "cuda"
    before = {child.pid for child in multiprocessing.active_children()}
    traced = trace(config)
    assert {child.pid for child in multiprocessing.active_children()} <= before, "no rank stays behind"
    assert [rank.rank for rank in traced] == [0, 128, 256, 384]
    for rank in traced:
        assert rank.traced == rank.planned
        assert {("tp", "all_gather"), ("tp", "reduce_scatter"), ("dp", "all_gather"), ("world", "all_reduce")} <= rank.traced.keys()
        assert rank.planned_peak_bytes == pytest.approx(rank.traced_peak_bytes, rel=0.1)
        assert rank.micro_batches < 40, "the pipeline is full before"
    assert json.loads(json.dumps(traced[0].record()))["same_calls"] is True


def test_one_rank_of_a_cpu_s_job_with_what_the_code_reads_of_tensors() -> None:
    """SGD asks whether the step is taken; dropout and documents draw and mask; gathers are sends and receives."""
    config = small_config(
        parallel__tp=2, parallel__pp=2, parallel__sequence_parallel=True, model__dropout=0.1, data__document_mask=True,
        data__source="python_docs", optimizer__name="sgd",
    )  # fmt: skip
    config.plan.trace_rank = 1
    (traced,) = trace(config)
    assert (traced.pp_rank, traced.rank) == (1, 2)
    assert traced.traced == traced.planned
    assert {("tp", "send"), ("tp", "receive")} <= traced.traced.keys()
    assert ("tp", "all_gather") not in traced.traced
    assert "calls and bytes are those of the plan, to the byte" in facts(config, [traced])[0][1]
    traced.traced["tp", "send"] = (1, 1)
    assert "calls and bytes differ on pipeline rank 1" in facts(config, [traced])[0][1]
    console = Console(width=160, record=True)
    console.print(call_table([traced]))
    assert console.export_text().count("differs") == 1


def test_no_such_rank_is_refused_before_anything_starts() -> None:
    config = small_config(parallel__pp=2)
    config.plan.trace_rank = 2
    with pytest.raises(ConfigError, match=r"plan.trace_rank=2 is not below parallel.pp=2: use 0 to 1, or null"):
        trace(config)


@pytest.mark.parametrize(("schedule", "stages"), [("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2), ("gpipe", 1)])
def test_a_shorter_step_fills_the_pipeline_as_the_whole_one(schedule: str, stages: int) -> None:
    config = small_config(
        parallel__pp=4, parallel__schedule=schedule, parallel__stages_per_rank=stages, model__num_layers=8,
        parallel__micro_batch_size=1, train__global_batch_size=64,
    )  # fmt: skip
    shorter, pipeline = shortened(config)
    assert pipeline.peaks == describe(config).peaks
    assert (shorter.parallel.micro_batches < 64) == (schedule != "gpipe"), "gpipe keeps all micro-batches"
    assert shorter.batch_size == shorter.parallel.micro_batches
