"""A step's time: its parts add up, its limits are those of FLOPs over rate, and more of anything takes longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support import small_config
from tptrain.config import Config, ConfigError
from tptrain.model.flops import flops_per_token
from tptrain.monitor.metrics import mfu
from tptrain.plan.communication import message_bytes
from tptrain.plan.links import Link, collective_seconds, group_links
from tptrain.plan.pipeline import describe
from tptrain.plan.stage_time import stage_times
from tptrain.plan.time import StepTime, estimate, step_time, training

GIGA = 1e9
HARDWARE = {
    "device": "cuda", "peak_flops_per_second": 2000 * GIGA, "fp32_flops_per_second": 1000 * GIGA, "matmul_efficiency": 0.5,
    "memory_bytes_per_second": 100 * GIGA, "node_bytes_per_second": 10 * GIGA, "node_latency_seconds": 1e-6,
    "devices_per_node": 8, "network_bytes_per_second": 1 * GIGA, "network_latency_seconds": 1e-5,
}  # fmt: skip
ONLY_PRODUCTS = {"memory_bytes_per_second": 1e30, "node_bytes_per_second": 1e30, "node_latency_seconds": 1e-30}


def planned(only_products: bool = False, **changes: Any) -> Config:
    """A config of eight layers whose hardware is known; only_products: matrix products alone take time."""
    hardware = HARDWARE | (ONLY_PRODUCTS if only_products else {})
    small = {"model__num_layers": 8, "model__max_seq_len": 64, "data__seq_len": 64, "train__global_batch_size": 16}
    return small_config(**small | {f"hardware__{key}": value for key, value in hardware.items()} | changes)


def timed(only_products: bool = False, **changes: Any) -> StepTime:
    config = planned(only_products, **changes)
    return step_time(config, describe(config))


def product_flops(config: Config) -> float:
    """Of a step, from the model's FLOPs: causality hides half of attention, which backward makes once more than the products there say."""
    model, tokens = config.model, config.batch_size * config.data.seq_len
    attention = model.num_layers * 4 * model.hidden_size * config.data.seq_len * tokens
    return flops_per_token(model, config.data.seq_len) * tokens + attention * (-1 / 2 - 2 + 5 / 4)


LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"parallel__tp": 2},
    "tp2_sp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "dp2": {"parallel__dp": 2},
    "pp4": {"parallel__pp": 4},
    "pp4_gpipe": {"parallel__pp": 4, "parallel__schedule": "gpipe"},
    "pp2_interleaved": {"parallel__pp": 2, "parallel__schedule": "interleaved"},
    "pp4_zb_h1": {"parallel__pp": 4, "parallel__schedule": "zb_h1"},
    "pp2_zb_v": {"parallel__pp": 2, "parallel__schedule": "zb_v"},
    "tp2_pp2_dp2": {"parallel__tp": 2, "parallel__pp": 2, "parallel__dp": 2, "train__precision": "bf16"},
    "recompute": {"parallel__recompute": "full", "parallel__pp": 2, "parallel__tp": 2},
}


def test_one_rank_takes_its_flops_over_its_rate() -> None:
    config, step = planned(only_products=True), timed(only_products=True)
    assert step.step_seconds == pytest.approx(product_flops(config) / (500 * GIGA))
    assert (step.tp_seconds, step.pp_seconds, step.dp_seconds, step.bubble_seconds, step.bubble_fraction) == (0, 0, 0, 0, 0)
    assert step.tokens_per_second == pytest.approx(config.batch_size * config.data.seq_len / step.step_seconds)


def test_tp_shares_the_products() -> None:
    whole, half = (timed(only_products=True, parallel__tp=tp, model__vocab_size=256) for tp in (1, 2))
    assert half.step_seconds == pytest.approx(whole.step_seconds / 2)


def test_dp_shares_the_batch() -> None:
    whole, half = (timed(only_products=True, parallel__dp=dp) for dp in (1, 2))
    assert half.step_seconds == pytest.approx(whole.step_seconds / 2)


def test_recomputation_makes_the_blocks_once_more() -> None:
    kept, made = (timed(only_products=True, parallel__recompute=kind) for kind in ("none", "full"))
    config = planned()
    model, tokens = config.model, config.batch_size * config.data.seq_len
    forward = (flops_per_token(model, config.data.seq_len) / 3 - 2 * model.vocab_size * model.hidden_size) * tokens
    forward -= model.num_layers * 2 * model.hidden_size * config.data.seq_len * tokens  # causality
    assert made.step_seconds - kept.step_seconds == pytest.approx(forward / (500 * GIGA))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_parts_add_up(name: str) -> None:
    step = timed(**LAYOUTS[name])
    parts = (step.compute_seconds, step.tp_seconds, step.pp_seconds, step.dp_seconds, step.other_seconds, step.bubble_seconds)
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(step.step_seconds)
    config = planned(**LAYOUTS[name])
    assert (step.tp_seconds > 0) == (config.parallel.tp > 1)
    assert (step.pp_seconds > 0) == (config.parallel.pp > 1)
    assert (step.dp_seconds > 0) == (int(config.parallel.dp) > 1)
    assert (step.bubble_fraction > 1e-9) == (config.parallel.pp > 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mfu_is_that_of_the_metrics(name: str) -> None:
    config = planned(**LAYOUTS[name])
    step = step_time(config, describe(config))
    expected = mfu(flops_per_token(config.model, config.data.seq_len), step.tokens_per_second, 2000 * GIGA, config.processes)
    assert step.mfu == pytest.approx(expected)


def test_mfu_is_none_where_the_peak_is_unknown() -> None:
    assert timed(hardware__peak_flops_per_second=None).mfu is None


def one_stage_costs(config: Config) -> float:
    """Seconds of a forward and a backward of one of equal stages."""
    layers = config.model.num_layers // config.parallel.num_stages
    (time,) = stage_times(config, [(layers, 2 * layers)])
    return time.forward + time.backward


@pytest.mark.parametrize(("p", "m", "schedule", "v"), [(2, 8, "1f1b", 1), (4, 8, "1f1b", 1), (4, 4, "gpipe", 1), (2, 4, "interleaved", 2)])
def test_bubble_of_equal_stages(p: int, m: int, schedule: str, v: int) -> None:
    """(p - 1) / (v m + p - 1) of the ranks' time, without transfers and with a head that costs nothing next to the blocks."""
    step = timed(
        only_products=True, parallel__pp=p, parallel__schedule=schedule, parallel__stages_per_rank=v, parallel__partition="even",
        model__vocab_size=2, model__hidden_size=512, model__ffn_hidden_size=2048, parallel__micro_batch_size=16 // m,
        model__tie_embeddings=False,
    )  # fmt: skip
    assert step.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1), rel=1e-2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_estimate_is_close(name: str) -> None:
    config = planned(**LAYOUTS[name])
    simulated, formula = step_time(config, describe(config)), estimate(config)
    assert formula.simulation is None
    assert formula.step_seconds == pytest.approx(simulated.step_seconds, rel=0.08)
    assert replace(formula, step_seconds=0, tokens_per_second=0, mfu=0, bubble_fraction=0, pp_seconds=0, bubble_seconds=0) == replace(
        simulated, step_seconds=0, tokens_per_second=0, mfu=0, bubble_fraction=0, pp_seconds=0, bubble_seconds=0, simulation=None
    )


# ---- more of anything takes longer -------------------------------------------------------------------------


def test_worse_hardware_takes_longer() -> None:
    layout = LAYOUTS["tp2_pp2_dp2"]
    base = timed(**layout).step_seconds
    for key, value in (
        ("peak_flops_per_second", 1000 * GIGA), ("matmul_efficiency", 0.4), ("memory_bytes_per_second", 50 * GIGA),
        ("node_bytes_per_second", 5 * GIGA), ("node_latency_seconds", 1e-5), ("matmul_half_size", 100), ("kernel_seconds", 1e-6),
        ("devices_per_node", 4),
    ):  # fmt: skip
        assert timed(**layout, **{f"hardware__{key}": value}).step_seconds > base, key


def test_more_micro_batches_of_the_same_batch_shrink_the_bubble() -> None:
    bubbles = [timed(only_products=True, parallel__pp=4, parallel__micro_batch_size=size).bubble_fraction for size in (8, 4, 2, 1)]
    assert bubbles == sorted(bubbles, reverse=True)


def test_sequence_parallelism_saves_time_where_links_are_free() -> None:
    free = {"hardware__node_bytes_per_second": 1e30, "hardware__node_latency_seconds": 1e-30}
    assert timed(parallel__tp=2, parallel__sequence_parallel=True, **free).step_seconds < timed(parallel__tp=2, **free).step_seconds


# ---- communication -----------------------------------------------------------------------------------------


def test_forward_communication_of_tp_is_exposed_and_hidden_backward() -> None:
    """A slow device hides the sums of a backward under its weight gradients, but not those of a forward, which have nothing to run under;
    a schedule that puts weight gradients off hides none."""
    config = planned(parallel__tp=2)
    link = group_links(config)["tp"]
    tokens = config.parallel.micro_batch_size * config.data.seq_len
    one = collective_seconds("all_reduce", 2, tokens * 32 * 4, link)
    config.hardware.fp32_flops_per_second = 1e6
    (time,) = stage_times(config, [(2, 5)])
    assert time.forward_tp == pytest.approx(3 * 2 * one)
    assert time.backward_tp == 0
    assert time.input_gradient_tp == pytest.approx(3 * 2 * one)
    config.hardware.fp32_flops_per_second = 1e30
    config.hardware.memory_bytes_per_second = 1e30
    (time,) = stage_times(config, [(2, 5)])
    assert time.backward_tp == pytest.approx(time.input_gradient_tp)


def test_dp_of_a_cpu_hides_nothing() -> None:
    gpu, cpu = (timed(parallel__dp=2, hardware__device=device) for device in ("cuda", "cpu"))
    config = planned(parallel__dp=2)
    link = Link(10 * GIGA, 1e-6)
    weights = num_elements(config)
    blocks, rest = weights
    expected = 0.0
    for operation in ("all_gather", "reduce_scatter"):
        expected += 8 * collective_seconds(operation, 2, blocks * 4, link) + collective_seconds(operation, 2, rest * 4, link)
    assert cpu.dp_seconds == pytest.approx(expected)
    assert gpu.dp_seconds < cpu.dp_seconds


def num_elements(config: Config) -> tuple[int, int]:
    """Parameters of a block, and of all that is none."""
    h, ffn = config.model.hidden_size, config.model.ffn_hidden_size
    block = 4 * (h * h + h) + 2 * h * ffn + ffn + h + 4 * h
    return block, 257 * h + config.model.max_seq_len * h + 2 * h


def test_transfers_fill_and_empty_the_pipeline() -> None:
    """With one micro-batch nothing hides them: p - 1 there and p - 1 back."""
    config = planned(parallel__pp=4, parallel__micro_batch_size=16)
    step = step_time(config, describe(config))
    one = collective_seconds("send", 2, message_bytes(config), group_links(config)["pp_up"])
    assert step.pp_seconds == pytest.approx(2 * 3 * one)


# ---- a whole training --------------------------------------------------------------------------------------


def test_training_of_so_many_tokens() -> None:
    config = planned(parallel__tp=2)
    step = step_time(config, describe(config))
    assert training(config, step).dollars is None
    assert training(config, step).tokens == 20 * 16 * 64
    config.plan.tokens, config.hardware.dollars_per_device_hour = 1e12, 2.5
    whole = training(config, step)
    assert whole.days == pytest.approx(1e12 / step.tokens_per_second / 86400)
    assert whole.dollars == pytest.approx(whole.days * 24 * 2 * 2.5)


def test_unknown_speed_is_refused() -> None:
    config = planned(parallel__tp=2)
    config.hardware.node_bytes_per_second = None
    with pytest.raises(ConfigError, match=r"hardware\.node_bytes_per_second=null is unknown"):
        step_time(config, describe(config))
    with pytest.raises(ConfigError, match="memory_bytes_per_second"):
        step_time(small_config(hardware__fp32_flops_per_second=1e12, hardware__matmul_efficiency=1.0), describe(small_config()))
