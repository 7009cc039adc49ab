"""What `resolve` fills in, and what it refuses, by the arithmetic."""

from __future__ import annotations

import pytest

from tests.support import small_config
from tptrain.config import Config, ConfigError, resolve
from tptrain.data_config import SourceConfig


def unresolved(**changes: object) -> Config:
    """A small config in which dp, the stages and the batch are still open."""
    config = small_config()
    config.parallel.dp, config.parallel.stages_per_rank, config.train.global_batch_size = "auto", "auto", None
    for key, value in changes.items():
        group, _, name = key.partition("__")
        setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize(
    ("started", "devices", "dp"),
    [(None, None, 1), (8, None, 2), (4, None, 1), (None, 8, 2), (None, 12, 3), (None, 5, 1)],
)
def test_dp_auto_is_processes_over_tp_pp(started: int | None, devices: int | None, dp: int) -> None:
    config = resolve(unresolved(parallel__tp=2, parallel__pp=2), started, devices)
    assert config.parallel.dp == dp
    assert config.processes == 4 * dp


def test_global_batch_size_follows_from_micro_batches() -> None:
    config = resolve(unresolved(parallel__micro_batch_size=3, parallel__micro_batches=5, parallel__dp=2))
    assert config.train.global_batch_size == 30


def test_micro_batches_follow_from_global_batch_size() -> None:
    config = resolve(unresolved(parallel__micro_batch_size=2, parallel__dp=2, train__global_batch_size=24))
    assert config.parallel.micro_batches == 6


def test_resolving_leaves_the_argument_alone() -> None:
    config = unresolved()
    resolve(config, started=1)
    assert config.parallel.dp == "auto"


@pytest.mark.parametrize(
    ("changes", "started", "devices", "message"),
    [
        ({"parallel__tp": 3}, None, None, "parallel.tp=3 does not divide model.num_heads=4: use 1, 2 or 4"),
        ({"parallel__tp": 2, "model__ffn_hidden_size": 63}, None, None, "parallel.tp=2 does not divide model.ffn_hidden_size=63: use 1"),
        ({"model__hidden_size": 30}, None, None, "model.num_heads=4 does not divide model.hidden_size=30: use 1, 2, 3, 5, 6 or 10"),
        ({"parallel__pp": 5}, None, None,
         "parallel.pp=5 needs a layer a stage, but model.num_layers=4: use parallel.pp=4 or less, or model.num_layers=5 or more"),
        ({"data__seq_len": 17}, None, None,
         "data.seq_len=17 is over model.max_seq_len=16: use data.seq_len=16 or less, or a larger model.max_seq_len"),
        ({"parallel__tp": 2, "parallel__dp": 3}, 4, None,
         "parallel.dp=3 gives tp 2 x pp 1 x dp 3 = 6 processes, but 4 were started: use parallel.dp=2"),
        ({"parallel__tp": 4}, 6, None, "parallel.dp=1 gives tp 4 x pp 1 x dp 1 = 4 processes, but 6 were started: start 4 processes"),
        ({"parallel__dp": 4}, None, 2,
         "parallel.dp=4 gives tp 1 x pp 1 x dp 4 = 4 processes, but this machine has 2 GPUs: use parallel.dp=2"),
        ({"train__global_batch_size": 7, "parallel__dp": 1}, None, None,
         "train.global_batch_size=7 is no multiple of micro_batch_size 2 x dp 1 = 2: use 6 or 8"),
        ({"optimizer__lr": -1.0}, None, None, "optimizer.lr=-1.0 is below 0: use 0 or more"),
        ({"optimizer__lr": float("nan")}, None, None, "optimizer.lr=nan is below 0: use 0 or more"),
        ({"optimizer__betas": [0.9]}, None, None, "optimizer.betas=[0.9] is not two numbers from 0 up to 1: use [0.9,0.95]"),
        ({"parallel__dp": "two"}, None, None, "parallel.dp=two is neither auto nor a positive integer: use auto, 1, 2, ..."),
        ({"parallel__schedule": "1f2b"}, None, None, "parallel.schedule=1f2b is unknown: use one of gpipe, 1f1b, interleaved, zb_h1, zb_v, "
             "or the path of a file that ends in .txt"),
        ({"parallel__schedule": "mine.yaml"}, None, None,
         "parallel.schedule=mine.yaml is unknown: use one of gpipe, 1f1b, interleaved, zb_h1, "
             "zb_v, or the path of a file that ends in .txt"),
        ({"parallel__stages_per_rank": 2}, None, None,
         "parallel.stages_per_rank=2 does not fit parallel.schedule=1f1b, which has 1 stage a rank: "
             "use 1 or auto, or parallel.schedule=gpipe or interleaved or zb_v"),
        ({"parallel__schedule": "zb_h1", "parallel__stages_per_rank": 3}, None, None,
         "parallel.stages_per_rank=3 does not fit parallel.schedule=zb_h1, which has 1 stage a rank: "
         "use 1 or auto, or parallel.schedule=gpipe or interleaved"),
        ({"parallel__schedule": "zb_v", "parallel__stages_per_rank": 1}, None, None,
         "parallel.stages_per_rank=1 does not fit parallel.schedule=zb_v, which has 2 stages a rank: "
         "use 2 or auto, or parallel.schedule=gpipe or 1f1b or interleaved or zb_h1"),
        ({"parallel__stages_per_rank": 0}, None, None,
         "parallel.stages_per_rank=0 is neither auto nor a positive integer: use auto, 1, 2, ..."),
        ({"parallel__stages_per_rank": "two"}, None, None,
         "parallel.stages_per_rank=two is neither auto nor a positive integer: use auto, 1, 2, ..."),
        ({"parallel__schedule": "zb_v", "parallel__pp": 3}, None, None, "parallel.pp=3 x parallel.stages_per_rank=2 needs a layer a stage, "
             "but model.num_layers=4: use parallel.pp=2 or less, or model.num_layers=6 or more"),
        ({"parallel__schedule": "gpipe", "parallel__stages_per_rank": 5}, None, None,
         "parallel.pp=1 x parallel.stages_per_rank=5 needs a layer "
             "a stage, but model.num_layers=4: use parallel.stages_per_rank=4, or model.num_layers=5 or more"),
        ({"parallel__pp": 2, "parallel__partition": [1, 2]}, None, None,
         "parallel.partition=[1,2] is not 2 numbers of layers, 1 or more each, "
             "that sum to model.num_layers=4: use balanced, even or [2,2]"),
        ({"parallel__pp": 3, "parallel__partition": [2, 2]}, None, None,
         "parallel.partition=[2,2] is not 3 numbers of layers, 1 or more each, "
             "that sum to model.num_layers=4: use balanced, even or [2,1,1]"),
        ({"parallel__pp": 2, "parallel__partition": [0, 4]}, None, None,
         "parallel.partition=[0,4] is not 2 numbers of layers, 1 or more each, "
             "that sum to model.num_layers=4: use balanced, even or [2,2]"),
        ({"parallel__pp": 2, "parallel__partition": [1.5, 2.5]}, None, None, "parallel.partition=[1.5,2.5] is not 2 numbers of layers, "
             "1 or more each, that sum to model.num_layers=4: use balanced, even or [2,2]"),
        ({"parallel__partition": "odd"}, None, None, "parallel.partition=odd is not 1 number of layers, 1 or more each, "
             "that sum to model.num_layers=4: use balanced, even or [4]"),
        ({"parallel__recompute": "some"}, None, None, "parallel.recompute=some is unknown: use one of none, selective, full"),
        ({"train__compile": True}, None, None, "train.compile=true is not available: use false"),
        ({"model__num_kv_heads": 3}, None, None, "model.num_kv_heads=3 does not divide model.num_heads=4: use 1, 2 or 4"),
        ({"model__num_heads": 16, "model__num_kv_heads": 2, "parallel__tp": 32}, None, None,
         "parallel.tp=32 does not divide model.num_heads=16: use 1, 2, 4, 8 or 16"),
        ({"model__hidden_size": 48, "model__num_heads": 12, "model__num_kv_heads": 6, "model__ffn_hidden_size": 48, "parallel__tp": 4},
         None, None, "parallel.tp=4 neither divides model.num_kv_heads=6 nor is a multiple of it: use 1, 2, 3, 6 or 12"),
        ({"model__num_heads": 32, "model__position": "rope"}, None, None,
         "model.position=rope turns pairs, but hidden_size 32 / num_heads 32 = 1 is odd: "
         "use model.position=learned, or heads of an even size"),
        ({"data__seq_len": 15, "parallel__tp": 2, "parallel__sequence_parallel": True}, None, None,
         "data.seq_len=15 is not split evenly by parallel.tp=2, as sequence_parallel asks: use 14 or parallel.sequence_parallel=false"),
        ({"model__dropout": 1.0}, None, None, "model.dropout=1.0 is not below 1: use a value from 0 up to, not including, 1"),
        ({"train__label_smoothing": -0.1}, None, None, "train.label_smoothing=-0.1 is below 0: use 0 or more"),
        ({"train__loss_chunk_tokens": 0}, None, None, "train.loss_chunk_tokens=0 is below 1: use 1 or more"),
        ({"launch__timeout_seconds": 0.0}, None, None, "launch.timeout_seconds=0.0 is not above 0: use a positive number"),
        ({"optimizer__grad_clip": 0.0}, None, None, "optimizer.grad_clip=0.0 is not above 0: use a positive number, or null"),
        ({"data__val_sets": {"books": SourceConfig("text", path="books")}}, None, None,
         "data.val_sets.books=text is text, and source=memorize trains on random ids, which no tokenizer stands behind: leave it away, "
         "or train on text"),
        ({"data__val_fraction": 1.0}, None, None, "data.val_fraction=1.0 is not from 0 up to, not including, 1: use a share such as 0.05"),
    ],
)  # fmt: skip
def test_refusals_name_key_value_rule_and_remedy(changes: dict, started: int | None, devices: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve(unresolved(**changes), started, devices)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("schedule", "given", "stages"),
    [
        ("gpipe", "auto", 1), ("gpipe", 2, 2), ("1f1b", "auto", 1), ("1f1b", 1, 1), ("interleaved", "auto", 2), ("interleaved", 1, 1),
        ("zb_h1", "auto", 1), ("zb_v", "auto", 2), ("zb_v", 2, 2), ("some/file.txt", "auto", 1), ("some/file.txt", 2, 2),
    ],
)  # fmt: skip
def test_stages_per_rank(schedule: str, given: int | str, stages: int) -> None:
    config = resolve(unresolved(parallel__pp=2, parallel__schedule=schedule, parallel__stages_per_rank=given))
    assert config.parallel.stages_per_rank == stages
    assert config.parallel.num_stages == 2 * stages
    assert config.parallel.schedule_is_file == (schedule == "some/file.txt")


@pytest.mark.parametrize("partition", ["balanced", "even", [3, 1], [2, 2]])
def test_partitions_that_fit(partition: object) -> None:
    assert resolve(unresolved(parallel__pp=2, parallel__partition=partition)).parallel.partition == partition
