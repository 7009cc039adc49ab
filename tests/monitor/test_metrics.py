import json
import math

import numpy as np
import pytest

from tptrain.monitor.metrics import MetricsFile, bubble_fraction, eval_record, mfu, read_metrics, train_record, windows
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.pipeline.simulate import Costs, simulate
from tptrain.pipeline.timeline import busy

KNOWN = {
    "step": 10,
    "tokens": 40_960,
    "loss": 4.5,
    "grad_norm": 0.75,
    "lr": 1e-3,
    "step_time": 0.5,
    "tokens_per_step": 4096,
    "model_flops_per_token": 6e9,
    "peak_flops_per_second": 1e15,
    "processes": 4,
    "bubble_fraction": 0.25,
    "data_wait_fraction": 0.004,
    "peak_memory_bytes": 123,
    "skipped_steps": 2,
    "time": 1_700_000_000.5,
}


def test_a_training_record_has_the_contract_s_keys_in_order():
    record = train_record(**KNOWN)
    assert list(record) == [
        "step", "tokens", "loss", "grad_norm", "lr", "step_time", "tokens_per_second", "mfu", "bubble_fraction", "data_wait_fraction",
        "peak_memory_bytes", "skipped_steps", "time",
    ]  # fmt: skip
    assert record["data_wait_fraction"] == 0.004
    assert (record["bubble_fraction"], record["peak_memory_bytes"]) == (0.25, 123)
    assert record["tokens_per_second"] == 8192  # 4096 tokens in half a second
    assert record["mfu"] == pytest.approx(6e9 * 8192 / (4 * 1e15))


def test_mfu_by_hand():
    # A 1B model needs about 6 GFLOPs a token; 8 devices of 312 TFLOP/s that read 208,000 tokens/s are half busy.
    assert mfu(6e9, 208_000, 312e12, 8) == pytest.approx(0.5)


@pytest.mark.parametrize("unknown", ["step_time", "model_flops_per_token", "peak_flops_per_second"])
def test_what_rests_on_an_unknown_number_is_unknown(unknown):
    record = train_record(**{**KNOWN, unknown: None})
    assert record["mfu"] is None
    assert (record["tokens_per_second"] is None) == (unknown == "step_time")


def test_the_bubble_by_hand():
    # Three ranks of which the slowest needs 10 seconds: 30 to fill, 9 + 6 + 3 filled.
    assert bubble_fraction([9, 6, 3], [9.5, 10, 8]) == pytest.approx(12 / 30)
    assert bubble_fraction([5.0], [5.0]) == 0
    assert bubble_fraction([0.1 + 0.2], [0.3]) == 0, "rounding makes no negative one"
    assert bubble_fraction([0.0, 0.0], [0.0, 0.0]) is None
    assert bubble_fraction([0.0, 0.0], windows([math.inf] * 2, [-math.inf] * 2, [1, 1])) is None
    assert train_record(**{**KNOWN, "bubble_fraction": None})["bubble_fraction"] is None


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("machines", [1, 2])
def test_the_bubble_of_a_step_without_delay_is_the_simulated_one(name: str, machines: int):
    """Four ranks, eight micro-batches. The second machine's clock is ahead; the longer of their two times may be too short."""
    v = 2 if name in ("interleaved", "zb_v") else 1
    costs = [1 / v] * (4 * v)
    step = simulate(SCHEDULES[name](4, v, 8), Costs(costs, costs, costs))
    clocks = [rank * machines // 4 for rank in range(4)]
    starts = [spans[0].start + 1e6 * clock for spans, clock in zip(step.timeline, clocks, strict=True)]
    ends = [spans[-1].end + 1e6 * clock for spans, clock in zip(step.timeline, clocks, strict=True)]
    measured = bubble_fraction([busy(spans) for spans in step.timeline], windows(starts, ends, clocks))
    if machines == 1 or name != "zb_v":
        assert measured == pytest.approx(step.bubble_fraction)
    else:
        assert 0 < measured < step.bubble_fraction


def test_an_evaluation_record():
    assert eval_record(step=5, val_loss=math.log(7)) == {"step": 5, "val_loss": math.log(7), "val_perplexity": pytest.approx(7)}
    assert eval_record(step=5, val_loss=1e4)["val_perplexity"] is None
    assert eval_record(step=5, val_loss=None) == {"step": 5, "val_loss": None, "val_perplexity": None}
    record = eval_record(step=5, val_loss=0.0, sets={"val_loss/wiki": 1.0, "val_loss/code": None})
    assert record == {"step": 5, "val_loss": 0.0, "val_perplexity": 1.0, "val_loss/wiki": 1.0, "val_loss/code": None}


def test_what_is_not_finite_becomes_null_and_each_line_is_there_at_once(tmp_path):
    file = MetricsFile(tmp_path / "run", 0)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": np.float32(0.5), "mfu": None, "tokens": np.int64(3)})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5, "mfu": null, "tokens": 3}\n'
    file.write(eval_record(step=1, val_loss=math.nan))
    assert read_metrics(tmp_path / "run")[1] == {"step": 1, "val_loss": None, "val_perplexity": None}
    file.close()
    file.close()


def test_resuming_cuts_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step":10,"loss":3.0}\n{"step": 20, "loss": 2.5}\n{"step": 20, "val_loss": 2.6}\n'
    path.write_text(kept + '{"step": 30, "loss": 2.0}\n{"step": 40, "lo')
    file = MetricsFile(tmp_path, 20)
    assert path.read_text() == kept
    file.write({"step": 30, "loss": 2.0})
    file.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20, 20, 30]
    MetricsFile(tmp_path, 20, evaluation_due=True).close()
    assert path.read_text() == "".join(kept.splitlines(keepends=True)[:2]), "the evaluation of step 20 is made again"


@pytest.mark.parametrize("tail", ['{"step": 5, "loss": 1', '{"step": 5', "{", "\x00\x00\x00", '{"step": 5, "loss": 1}garbage\n', "\n\n"])
def test_a_torn_end_goes_and_the_next_record_stands_on_its_own_line(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 2.0}\n' + tail)
    assert read_metrics(tmp_path) == [{"step": 4, "loss": 2.0}]
    file = MetricsFile(tmp_path, 100)
    file.write({"step": 6})
    file.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [{"step": 4, "loss": 2.0}, {"step": 6}]


def test_nothing_is_rewritten_where_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n')
    before = path.stat().st_ino
    MetricsFile(tmp_path, 4).close()
    assert path.stat().st_ino == before
    MetricsFile(tmp_path, 3).close()
    assert path.read_text() == ""


def test_no_file_means_no_records(tmp_path):
    assert read_metrics(tmp_path) == []
