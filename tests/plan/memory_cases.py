"""Layouts of small models whose memory is measured: each as changes to a config, by the number of ranks that it takes."""

from __future__ import annotations

from typing import Any

GPT: dict[str, Any] = {
    "model__hidden_size": 128, "model__num_heads": 4, "model__ffn_hidden_size": 512, "model__num_layers": 4, "model__vocab_size": 2048,
    "model__max_seq_len": 128, "data__seq_len": 128, "train__global_batch_size": None, "parallel__micro_batches": 4,
    "parallel__micro_batch_size": 2,
}  # fmt: skip
LLAMA = GPT | {
    "model__num_kv_heads": 2, "model__norm": "rmsnorm", "model__activation": "swiglu", "model__position": "rope", "model__bias": False,
    "model__tie_embeddings": False, "model__ffn_hidden_size": 384,
}  # fmt: skip
EIGHT = {"model__num_layers": 8}
BF16 = {"train__precision": "bf16"}
UNTIED = {"model__tie_embeddings": False}
DROPOUT = {"model__dropout": 0.1}
DOCUMENTS = {"data__document_mask": True, "data__source": "python_docs"}
CHUNKS = {"train__loss_chunk_tokens": 64}


def layout(tp: int = 1, pp: int = 1, dp: int = 1, **changes: Any) -> dict[str, Any]:
    """Keys of `parallel`."""
    return {f"parallel__{key}": value for key, value in ({"tp": tp, "pp": pp, "dp": dp} | changes).items()}


def recompute(kind: str) -> dict[str, Any]:
    """Its key alone."""
    return {"parallel__recompute": kind}


CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "gpt": GPT,
        "gpt, untied, one micro-batch": GPT | UNTIED | {"parallel__micro_batches": 1, "parallel__micro_batch_size": 4},
        "gpt, selective": GPT | recompute("selective"),
        "gpt, full": GPT | recompute("full"),
        "gpt, bf16": GPT | BF16,
        "gpt, bf16, dropout": GPT | BF16 | DROPOUT,
        "gpt, dropout, selective": GPT | DROPOUT | recompute("selective"),
        "gpt, dropout, full": GPT | DROPOUT | recompute("full"),
        "gpt, chunks": GPT | CHUNKS,
        "llama, documents": LLAMA | DOCUMENTS,
        "gpt, documents, dropout": GPT | DROPOUT | DOCUMENTS,
        "gpt, sgd": GPT | {"optimizer__name": "sgd"},
        "llama": LLAMA,
        "llama, bf16, selective": LLAMA | BF16 | recompute("selective"),
        "llama, bf16, full, chunks": LLAMA | BF16 | CHUNKS | recompute("full"),
    },
    2: {
        "gpt, tp2": GPT | layout(tp=2),
        "gpt, tp2, sequence, bf16": GPT | BF16 | layout(tp=2, sequence_parallel=True),
        "llama, tp2, sequence, selective": LLAMA | layout(tp=2, sequence_parallel=True, recompute="selective"),
        "llama, tp2, sequence, full, chunks": LLAMA | CHUNKS | layout(tp=2, sequence_parallel=True, recompute="full"),
        "gpt, pp2, 1f1b": GPT | layout(pp=2, micro_batches=6),
        "gpt, untied, pp2, gpipe": GPT | UNTIED | layout(pp=2, schedule="gpipe"),
        "gpt, bf16, pp2, gpipe, full": GPT | BF16 | layout(pp=2, schedule="gpipe", recompute="full"),
        "llama, pp2, interleaved": LLAMA | layout(pp=2, schedule="interleaved"),
        "gpt, pp2, zb_h1": GPT | layout(pp=2, schedule="zb_h1"),
        "llama, bf16, pp2, zb_h1, selective": LLAMA | BF16 | layout(pp=2, schedule="zb_h1", recompute="selective"),
        "gpt, pp2, zb_v": GPT | layout(pp=2, schedule="zb_v", micro_batches=6),
        "llama, bf16, pp2, zb_v": LLAMA | BF16 | layout(pp=2, schedule="zb_v"),
        "gpt, dp2": GPT | layout(dp=2),
        "llama, bf16, dp2": LLAMA | BF16 | layout(dp=2),
        "gpt, dp2, one micro-batch": GPT | layout(dp=2, micro_batches=1, micro_batch_size=4),
    },
    4: {
        "gpt, pp4, 1f1b": GPT | EIGHT | layout(pp=4, micro_batches=8),
        "gpt, pp4, zb_h1, bf16": GPT | EIGHT | BF16 | layout(pp=4, schedule="zb_h1", micro_batches=8),
        "llama, pp4, zb_v, selective": LLAMA | EIGHT | layout(pp=4, schedule="zb_v", recompute="selective"),
        "gpt, tp2, pp2, interleaved": GPT | EIGHT | layout(tp=2, pp=2, schedule="interleaved"),
        "llama, pp2, dp2, bf16": LLAMA | BF16 | layout(pp=2, dp=2),
        "gpt, pp2, dp2, zb_v": GPT | layout(pp=2, dp=2, schedule="zb_v"),
        "gpt, tp2, dp2, sequence, full": GPT | layout(tp=2, dp=2, sequence_parallel=True, recompute="full"),
    },
}
