"""What `tptrain plan` predicts for trainings whose settings and speed others have published, as a table for docs/planning.md.

python -m benchmarks.plan_literature

Nothing is tuned to a row: the hardware is conf/hardware's. The step is `plan.time.estimate`'s. MFU is tptrain's on both sides: where a
source counts recomputed FLOPs too, or names tokens or seconds, its figure is converted here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tptrain.cli import compose
from tptrain.config import Config, resolve
from tptrain.model.flops import flops_per_token
from tptrain.plan.time import estimate

Published = Callable[[Config], float]
"""From a row's config to the MFU that its source reports."""


@dataclass(frozen=True)
class Row:
    """One published training."""

    name: str
    source: str
    overrides: str
    published: Published


# ---- from what a source reports to MFU ---------------------------------------------------------------------


def with_recomputation(teraflops: float) -> Published:
    """TFLOP/s a GPU by Narayanan et al. 2021, equation 3: 96 B s l h^2 (1 + s/6h + V/16lh) FLOPs a step, the second forward counted."""

    def convert(config: Config) -> float:
        model, s = config.model, config.data.seq_len
        layers, h, vocab = model.num_layers, model.hidden_size, model.vocab_size
        counted = 96 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h)) / s  # a token
        return teraflops * 1e12 / peak(config) * flops_per_token(model, s) / counted

    return convert


def iteration(seconds: float) -> Published:
    """Seconds a step."""

    def convert(config: Config) -> float:
        tokens = config.batch_size * config.data.seq_len
        return flops_per_token(config.model, config.data.seq_len) * tokens / (seconds * config.processes * peak(config))

    return convert


def tokens_of_a_gpu(rate: float) -> Published:
    """Tokens a second and GPU."""
    return lambda config: rate * flops_per_token(config.model, config.data.seq_len) / peak(config)


def share(mfu: float) -> Published:
    """MFU as the source has it."""
    return lambda config: mfu


def peak(config: Config) -> float:
    """FLOP/s of one device."""
    assert config.hardware.peak_flops_per_second is not None
    return config.hardware.peak_flops_per_second


# ---- the rows --------------------------------------------------------------------------------------------


def megatron(layers: int, hidden: int, heads: int, tp: int, pp: int, dp: int, batch: int, micro: int, stages: int, more: str = "") -> str:
    """A GPT of Megatron-LM on A100s: sequences of 2048, vocabulary 51200, its default dropout of 0.1, interleaved where a rank has several
    stages."""
    schedule = f"parallel.schedule=interleaved parallel.stages_per_rank={stages} " if stages > 1 else ""
    return (
        f"hardware=a100_80 model=gpt_175b model.num_layers={layers} model.hidden_size={hidden} model.num_heads={heads} "
        f"model.ffn_hidden_size={4 * hidden} model.vocab_size=51200 model.max_seq_len=2048 model.dropout=0.1 data.seq_len=2048 "
        f"parallel.tp={tp} parallel.pp={pp} parallel.dp={dp} train.global_batch_size={batch} parallel.micro_batch_size={micro} "
        f"{schedule}{more or 'parallel.recompute=full'}"
    )


def llama(model: str, tp: int, pp: int, dp: int, batch: int, micro: int, more: str) -> str:
    """A Llama 3 on H100s, sequences of 8192."""
    return (
        f"hardware=h100 {model} model.max_seq_len=8192 data.seq_len=8192 parallel.tp={tp} parallel.pp={pp} parallel.dp={dp} "
        f"train.global_batch_size={batch} parallel.micro_batch_size={micro} {more}"
    )


LLAMA_405B = (
    "model=llama_70b model.num_layers=126 model.hidden_size=16384 model.ffn_hidden_size=53248 model.num_heads=128 model.num_kv_heads=8"
)
SELECTIVE = "parallel.recompute=selective parallel.sequence_parallel=true"
INTERLEAVED_405B = "parallel.sequence_parallel=true parallel.schedule=interleaved parallel.stages_per_rank=7"
H100_GPT = (
    "hardware=h100 model=gpt_175b model.vocab_size=131072 model.max_seq_len=4096 model.tie_embeddings=false data.seq_len=4096 "
    "parallel.tp=8 parallel.pp=6 parallel.dp=2 train.global_batch_size=1152 parallel.micro_batch_size=1 " + SELECTIVE
)
TABLE_1, TABLE_2, REDUCING, MEGATRON, HERD, TITAN, ASYNC = (
    "Narayanan 2021, table 1", "Narayanan 2021, table 2", "Korthikanti 2022, table 5", "Megatron-LM, README", "Llama 3, table 4",
    "torchtitan, 2024-12", "torchtitan, 2025-06",
)  # fmt: skip
ROWS = [
    Row("GPT 1.7B tp1 pp1, 32 A100", TABLE_1, megatron(24, 2304, 24, 1, 1, 32, 512, 16, 1), with_recomputation(137)),
    Row("GPT 3.6B tp2 pp1, 64 A100", TABLE_1, megatron(30, 3072, 32, 2, 1, 32, 512, 16, 1), with_recomputation(138)),
    Row("GPT 7.5B tp4 pp1, 128 A100", TABLE_1, megatron(36, 4096, 32, 4, 1, 32, 512, 16, 1), with_recomputation(142)),
    Row("GPT 18.4B tp8 pp1, 256 A100", TABLE_1, megatron(40, 6144, 48, 8, 1, 32, 1024, 8, 1), with_recomputation(135)),
    Row("GPT 39.1B tp8 pp2, 512 A100", TABLE_1, megatron(48, 8192, 64, 8, 2, 32, 1536, 4, 1), with_recomputation(138)),
    Row("GPT 76.1B tp8 pp4, 1024 A100", TABLE_1, megatron(60, 10240, 80, 8, 4, 32, 1792, 2, 3), with_recomputation(140)),
    Row("GPT 145.6B tp8 pp8, 1536 A100", TABLE_1, megatron(80, 12288, 96, 8, 8, 24, 2304, 2, 2), with_recomputation(148)),
    Row("GPT 310.1B tp8 pp16, 1920 A100", TABLE_1, megatron(96, 16384, 128, 8, 16, 15, 2160, 1, 2), with_recomputation(155)),
    Row("GPT 529.6B tp8 pp35, 2520 A100", TABLE_1, megatron(105, 20480, 128, 8, 35, 9, 2520, 1, 3), with_recomputation(163)),
    Row("GPT 1T tp8 pp64, 3072 A100", TABLE_1, megatron(128, 25600, 160, 8, 64, 6, 3072, 1, 1), with_recomputation(163)),
    Row("GPT-3 175B tp8 pp12, 384 A100 (1)", TABLE_2, megatron(96, 12288, 96, 8, 12, 4, 1536, 1, 4), with_recomputation(153)),
    Row("GPT-3 175B tp8 pp12, 768 A100 (1)", TABLE_2, megatron(96, 12288, 96, 8, 12, 8, 1536, 1, 4), with_recomputation(149)),
    Row("GPT-3 175B tp8 pp12, 1536 A100 (1)", TABLE_2, megatron(96, 12288, 96, 8, 12, 16, 1536, 1, 4), with_recomputation(141)),
    Row("GPT 22B tp8 pp1, 8 A100, recompute full", REDUCING, megatron(48, 6144, 64, 8, 1, 1, 4, 4, 1), iteration(1.42)),
    Row("the same, selective and sequence-parallel", REDUCING, megatron(48, 6144, 64, 8, 1, 1, 4, 4, 1, SELECTIVE), iteration(1.10)),
    Row("GPT-3 175B tp8 pp8, 64 A100, recompute full", REDUCING, megatron(96, 12288, 96, 8, 8, 1, 64, 1, 3), iteration(18.13)),
    Row("the same, selective and sequence-parallel", REDUCING, megatron(96, 12288, 96, 8, 8, 1, 64, 1, 3, SELECTIVE), iteration(13.75)),
    Row("GPT 530B tp8 pp35, 280 A100, recompute full", REDUCING, megatron(105, 20480, 128, 8, 35, 1, 280, 1, 3), iteration(49.05)),
    Row("the same, selective and sequence-parallel", REDUCING, megatron(105, 20480, 128, 8, 35, 1, 280, 1, 3, SELECTIVE), iteration(37.83)),
    Row("GPT 1T tp8 pp64, 512 A100, recompute full", REDUCING, megatron(128, 25600, 160, 8, 64, 1, 512, 1, 1), iteration(94.42)),
    Row("the same, selective and sequence-parallel", REDUCING, megatron(128, 25600, 160, 8, 64, 1, 512, 1, 1, SELECTIVE), iteration(71.49)),
    Row("GPT-3 177B tp8 pp6, 96 H100 (2)", MEGATRON, H100_GPT, share(0.47)),
    Row("Llama 3 8B dp8, 8 H100 (3)", TITAN, llama("model=llama_8b", 1, 1, 8, 16, 2, "parallel.recompute=selective"),
        tokens_of_a_gpu(5762)),
    Row("Llama 3 70B tp8 dp32, 256 H100 (3)", ASYNC, llama("model=llama_70b", 8, 1, 32, 512, 16,
        "parallel.recompute=full parallel.sequence_parallel=true"), tokens_of_a_gpu(597)),
    Row("Llama 3 405B tp8 pp16 dp64, 8192 H100 (4)", HERD, llama(LLAMA_405B, 8, 16, 64, 2048, 1, INTERLEAVED_405B), share(0.43)),
    Row("Llama 3 405B tp8 pp16 dp128, 16384 H100 (4)", HERD, llama(LLAMA_405B, 8, 16, 128, 2048, 1, INTERLEAVED_405B), share(0.41)),
]  # fmt: skip


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    lines = ["| training | source | published MFU | predicted | error |", "|---|---|---|---|---|"]
    for row in ROWS:
        config = resolve(compose([*row.overrides.split(), "train.precision=bf16"]))
        predicted, published = estimate(config).mfu, row.published(config)
        assert predicted is not None
        lines.append(f"| {row.name} | {row.source} | {published:.1%} | {predicted:.1%} | {predicted / published - 1:+.0%} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
