"""What a device takes for products and passes, by formula, and what a block is made of."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import small_config
from tptrain.config import Config, ConfigError
from tptrain.model.flops import attention_flops, block_flops, head_flops
from tptrain.plan.compute import block_work, ends_work, update_work
from tptrain.plan.kernels import Device, Product, Work, device_of


def test_a_product_takes_its_flops_over_the_rate() -> None:
    device = Device(flops_per_second=2e12, bytes_per_second=1e12)
    assert device.seconds(Work((Product(1000, 2000, 3000),))) == 2 * 1000 * 2000 * 3000 / 2e12
    assert device.seconds(Work((), 5e11)) == 0.5
    both = Work((Product(10, 10, 10),), 3.0, 2.0) + Work((Product(1, 1, 1, 0.5),), 4.0, 1.0)
    assert (both.flops, both.bytes, both.kernels) == (2001, 7, 3)
    assert Device(1e12, 1e12, kernel_seconds=1e-6).seconds(Work((), 0.0, 3)) == pytest.approx(3e-6)


def test_thin_products_are_slower() -> None:
    device = Device(1e12, 1e12, half_size=100)
    times = [device.product_seconds([Product(4096, 4096, k)]) / k for k in (10, 100, 1000, 100_000)]
    assert times == sorted(times, reverse=True)
    large = 2 * 4096 * 4096 / 1e12
    assert times[1] == pytest.approx(2 * large), "half the rate at half_size"
    assert times[3] == pytest.approx(large, rel=0.03), "the smallest dimension is then 4096"


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("llama", [False, True])
def test_flops_are_those_of_the_model(tp: int, llama: bool) -> None:
    """All products of a block's forward, on all tp ranks, are `block_flops`, but for the hidden half of attention; the backward has two
    products for each of the weights', and five for attention's two."""
    changes: dict[str, Any] = {"parallel__tp": tp, "train__precision": "bf16"}
    if llama:
        changes |= {"model__activation": "swiglu", "model__norm": "rmsnorm", "model__position": "rope", "model__num_kv_heads": 4,
                    "model__bias": False}  # fmt: skip
    config = small_config(**changes)
    tokens = config.parallel.micro_batch_size * config.data.seq_len
    attention = tokens * attention_flops(config.model, config.data.seq_len)
    whole = tokens * block_flops(config.model, config.data.seq_len)
    block = block_work(config).whole
    assert tp * block.forward.flops == whole - attention / 2
    assert tp * block.weight_gradient.flops == whole - attention
    assert tp * block.input_gradient.flops == whole - attention + 5 / 4 * attention
    config.model.vocab_size = 256
    head = ends_work(config).head
    assert tp * head.forward.flops == tokens * head_flops(config.model)


def test_dropout_keeps_attention_whole() -> None:
    plain, dropped = small_config(), small_config(model__dropout=0.1)
    more = block_work(dropped).whole.forward.flops - block_work(plain).whole.forward.flops
    tokens = plain.parallel.micro_batch_size * plain.data.seq_len
    assert more == tokens * attention_flops(plain.model, plain.data.seq_len) / 2
    assert block_work(dropped).whole.forward.bytes > block_work(plain).whole.forward.bytes


def test_recomputation() -> None:
    again = {kind: block_work(small_config(parallel__recompute=kind)) for kind in ("none", "selective", "full")}
    assert (again["none"].again.flops, again["none"].again.bytes) == (0, 0)
    assert again["selective"].again.flops == 0
    assert 0 < again["selective"].again.bytes < again["full"].again.bytes
    assert again["full"].again == again["full"].whole.forward
    assert ends_work(small_config()).again.flops == 0
    chunked = ends_work(small_config(train__loss_chunk_tokens=8))
    assert chunked.again.flops == chunked.head.forward.flops


def test_sequence_parallelism_saves_passes_and_no_product() -> None:
    whole, split = (block_work(small_config(parallel__tp=2, parallel__sequence_parallel=on)).whole for on in (False, True))
    assert split.forward.flops == whole.forward.flops
    assert split.forward.bytes < whole.forward.bytes
    h, tokens = 32, 32
    norms_residuals_biases = (2 * 2 + 2 * 3 + 2 * 2) * tokens * h * 4
    assert whole.forward.bytes - split.forward.bytes == norms_residuals_biases / 2


def test_update() -> None:
    """AdamW reads and writes weight and two moments and reads the gradient, which the norm reads and the clip reads and writes before."""
    adamw = small_config()
    assert update_work(adamw, 1000, 1000).bytes == 1000 * 4 * (7 + 1 + 2)
    sgd = small_config(optimizer__name="sgd", optimizer__grad_clip=None)
    assert update_work(sgd, 1000, 1000).bytes == 1000 * 4 * (3 + 1)
    assert update_work(small_config(train__precision="bf16"), 1000, 1000).bytes - update_work(adamw, 1000, 1000).bytes == 1000 * (4 + 2)


def hardware(**changes: Any) -> Config:
    """A config whose hardware has these values."""
    return small_config(**{f"hardware__{key}": value for key, value in changes.items()})


def test_device_of_a_config() -> None:
    known = {"peak_flops_per_second": 4e14, "fp32_flops_per_second": 1e14, "matmul_efficiency": 0.5, "memory_bytes_per_second": 1e12}
    config = hardware(**known)
    assert device_of(config) == Device(0.5e14, 1e12)
    config.train.precision = "bf16"
    assert device_of(config).flops_per_second == 2e14
    config.hardware.matmul_flops_per_second = 3e14
    assert device_of(config).flops_per_second == 3e14, "a measured rate counts first"


@pytest.mark.parametrize("missing", ["fp32_flops_per_second", "matmul_efficiency", "memory_bytes_per_second"])
def test_an_unknown_speed_is_refused(missing: str) -> None:
    known = {"fp32_flops_per_second": 1e14, "matmul_efficiency": 0.5, "memory_bytes_per_second": 1e12}
    with pytest.raises(ConfigError, match=rf"hardware\.{missing}=null is unknown"):
        device_of(hardware(**known | {missing: None}))
