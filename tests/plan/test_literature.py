"""What is planned for published trainings stands in the docs as it comes out, and published figures are converted by their sources' own
formulas. No figure here is ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_literature import ROWS, iteration, table, tokens_of_a_gpu, with_recomputation
from tptrain.cli import compose
from tptrain.config import Config, resolve
from tptrain.model.flops import num_parameters
from tptrain.pipeline.actions import Kind
from tptrain.plan.communication import action_traffic
from tptrain.plan.links import Link, collective_seconds

DOCS = Path(__file__).parents[2] / "docs" / "planning.md"


def row_config(start: str) -> Config:
    (row,) = [row for row in ROWS if row.name.startswith(start)][:1]
    return resolve(compose([*row.overrides.split(), "train.precision=bf16"]))


def test_the_docs_show_the_table() -> None:
    assert "\n".join(table()) in DOCS.read_text()


def test_models_have_the_parameters_and_gpus_that_their_names_say() -> None:
    for row in ROWS:
        words = row.name.replace(",", "").split()
        named = [word for word in words if word[0].isdigit() and word[-1] in "BT"]
        if named:
            config = resolve(compose(row.overrides.split()))
            size = float(named[0][:-1]) * (1e9 if named[0][-1] == "B" else 1e12)
            assert num_parameters(config.model) == pytest.approx(size, rel=0.04), row.name
            place = next(place for place, word in enumerate(words) if word in ("A100", "H100"))
            assert config.processes == int(words[place - 1]), row.name


def test_conversions() -> None:
    """Korthikanti et al. give both seconds and MFU of the same run (table 5: 13.75 s and 51.4 %, 37.83 s and 56.0 %, 71.49 s and 56.3 %),
    and Narayanan et al. both TFLOP/s and the days that 175B take for 300 billion tokens (table 2: 153 TFLOP/s on 384 GPUs, 84 days)."""
    assert iteration(13.75)(row_config("GPT-3 175B tp8 pp8")) == pytest.approx(0.514, abs=5e-4)
    assert iteration(37.83)(row_config("GPT 530B")) == pytest.approx(0.560, abs=5e-4)
    assert iteration(71.49)(row_config("GPT 1T tp8 pp64, 512")) == pytest.approx(0.563, abs=5e-4)
    config = row_config("GPT-3 175B tp8 pp12, 384")
    rate = 300e9 / (84 * 86400) / 384
    assert tokens_of_a_gpu(rate)(config) == pytest.approx(with_recomputation(153)(config), rel=0.02)


def test_communication_of_gpt3() -> None:
    """Of one forward and backward with tp=8 over 300 GB/s each way, step by step as in the docs."""
    layout = ["parallel.tp=8", "parallel.micro_batch_size=1", "data.seq_len=2048", "train.precision=bf16"]
    config = resolve(compose(["model=gpt_175b", "hardware=a100_80", *layout]))
    b, s, h, layers, t = 1, 2048, 12288, 96, 8
    traffic = action_traffic(config, 0, layers)
    both = traffic[Kind.FORWARD] + traffic[Kind.INPUT_GRADIENT]
    sums = [each for each in both if each.purpose in ("row layers", "column layers")]
    assert [each.operation for each in sums] == ["all_reduce"] * 2
    calls, message = 4 * layers, b * s * h * 2
    assert (sum(each.calls for each in sums), sum(each.bytes for each in sums)) == (calls, calls * message)
    assert (message, 7 * message // 4) == (50_331_648, 88_080_384)
    one = 2 * (t - 1) / t * message / 300e9
    link = Link(config.hardware.node_bytes_per_second or 0.0, 0.0)
    assert link.bytes_per_second == 300e9
    assert collective_seconds("all_reduce", t, message, link) == pytest.approx(one)
    assert one == pytest.approx(293.6e-6, abs=0.05e-6)
    assert calls * one == pytest.approx(112.7e-3, abs=0.05e-3)
    text = DOCS.read_text()
    assert all(f"{number}" in text for number in ("50,331,648", "88,080,384", "293.6 us", "112.7 ms", "384 all-reduces"))
