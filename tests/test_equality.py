"""The layout never changes the result: any tp x pp x dp x schedule against one process, for 20 steps.

Initial weights bit-equal; loss within 1e-5 and gradient norm within 1e-4 relative, at every step; final weights and the
evaluation close. AdamW as well as SGD (Adam hides errors of scale), clipping at work in all of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tptrain.data.dataset import Data
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX

STEPS = 20
pytestmark = pytest.mark.timeout(1500)  # the first test waits for the training of all cases


@dataclass(frozen=True)
class Case:
    """A model and an optimizer (`base`), and a layout to train them under."""

    layout: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    ignored: bool = False
    """Whether a quarter of the targets do not count, in runs, so that micro-batches count different numbers."""

    @property
    def world(self) -> int:
        """Ranks of the layout."""
        return self.layout.get("tp", 1) * self.layout.get("pp", 1) * self.layout.get("dp", 1)

    @property
    def name(self) -> str:
        """Shown by pytest."""
        return ",".join(f"{key.split('__')[-1]}={value}" for key, value in (self.layout | self.base).items()) + ",ignored" * self.ignored

    @property
    def twin(self) -> str:
        """Names what one process trains for this case."""
        return f"{self.base!r}{',ignored' * self.ignored}"

    def config(self, alone: bool = False) -> Any:
        """The config of this case, or that of its serial twin."""
        layout = {} if alone else {f"parallel__{key}": value for key, value in self.layout.items()}
        return small_config(train__eval_steps=1, **self.base, **layout)


TIED_SGD = {"optimizer__name": "sgd", "optimizer__lr": 0.5, "optimizer__weight_decay": 0.0}  # vocabulary 257
UNTIED_ADAMW = {"model__tie_embeddings": False, "model__vocab_size": 1000}
LLAMA = {
    "model__position": "rope", "model__norm": "rmsnorm", "model__activation": "swiglu", "model__bias": False, "model__num_kv_heads": 2,
    "model__tie_embeddings": False, "model__num_layers": 2,
}  # fmt: skip
TWO_LAYERS = {"model__num_layers": 2}
SHALLOW_SGD = TIED_SGD | TWO_LAYERS
LLAMA_SGD = LLAMA | {"optimizer__name": "sgd", "optimizer__lr": 0.5, "optimizer__weight_decay": 0.0}
MQA_SGD = LLAMA_SGD | {"model__num_kv_heads": 1, "model__bias": True}
DROPOUT = {"model__dropout": 0.1}
SMOOTHED = {"train__label_smoothing": 0.1, "train__loss_chunk_tokens": 12}
APART = {"data__document_mask": True, "data__source": "python_docs"}  # a source that has documents; its text is not read
SP = {"sequence_parallel": True}
LAYOUTS = [
    {"tp": 2}, {"tp": 4}, {"dp": 2}, {"tp": 2, "dp": 2},
    {"pp": 2, "schedule": "gpipe"}, {"pp": 2}, {"pp": 4}, {"tp": 2, "pp": 2}, {"pp": 2, "dp": 2}, {"tp": 2, "pp": 2, "dp": 2},
]  # fmt: skip
CASES = [
    *(Case(layout, (TWO_LAYERS if layout.get("pp", 1) <= 2 else {}) | base) for layout in LAYOUTS for base in (TIED_SGD, UNTIED_ADAMW)),
    *(Case({"tp": 2, "pp": 2}, base) for base in ({}, UNTIED_ADAMW | TIED_SGD)), Case({"pp": 2}, {"model__num_layers": 7}),
    Case({"pp": 4, "micro_batch_size": 4}), Case({"pp": 2, "micro_batch_size": 1}, TIED_SGD | {"optimizer__momentum": 0.9}),
    Case({"tp": 2, "pp": 2, "micro_batch_size": 4}, {"model__bias": False}),
    Case({"tp": 4}, {"model__vocab_size": 5}),  # one rank owns no row of the vocabulary
    Case({"dp": 4}),
    # grouped key/value heads, also fewer than tp has ranks
    *(Case({"tp": 4} | more, base) for base in (LLAMA_SGD, MQA_SGD) for more in ({}, SP)), Case({"tp": 4}, LLAMA),
    Case({"tp": 2, "pp": 2}, LLAMA_SGD), Case({"tp": 2, "dp": 2} | SP, MQA_SGD), Case({"pp": 2, "dp": 2}, LLAMA),
    # sequence parallelism
    *(Case({"tp": 2} | SP | more, base) for more in ({}, {"pp": 2}, {"dp": 2}) for base in (SHALLOW_SGD, LLAMA_SGD)),
    Case({"tp": 2, "pp": 2, "dp": 2} | SP, SHALLOW_SGD), Case({"tp": 4} | SP, {}),
    Case({"tp": 2, "pp": 2, "schedule": "gpipe"} | SP, UNTIED_ADAMW),
    # recomputation
    *(Case({"tp": 2, "recompute": how} | more, base)
      for how in ("selective", "full") for more, base in (({}, SHALLOW_SGD), ({"pp": 2} | SP, LLAMA_SGD), ({"dp": 2}, SHALLOW_SGD))),
    # the loss
    Case({"tp": 2}, SMOOTHED | SHALLOW_SGD), Case({"tp": 4, "pp": 2} | SP, SMOOTHED | LLAMA_SGD), Case({"dp": 2, "tp": 2}, SMOOTHED),
    Case({"pp": 2, "dp": 2}, SHALLOW_SGD, ignored=True), Case({"tp": 2, "pp": 2} | SP, LLAMA_SGD, ignored=True),
    Case({"tp": 2, "dp": 2}, SMOOTHED | LLAMA_SGD, ignored=True), Case({"pp": 2, "micro_batch_size": 1}, {}, ignored=True),
    # dropout belongs to the sample and the place in the model
    Case({"tp": 2}, DROPOUT | SHALLOW_SGD), Case({"tp": 2, "pp": 2} | SP, DROPOUT | LLAMA_SGD),
    Case({"tp": 2, "dp": 2, "recompute": "full"} | SP, DROPOUT | SHALLOW_SGD),
    Case({"pp": 2, "micro_batch_size": 1}, DROPOUT | SHALLOW_SGD),
    Case({"tp": 4, "recompute": "selective"}, DROPOUT | LLAMA_SGD),
    # documents kept apart
    Case({"tp": 2}, APART | SHALLOW_SGD), Case({"tp": 2, "pp": 2, "dp": 2} | SP, APART | SHALLOW_SGD),
    Case({"dp": 2, "recompute": "full"}, APART | DROPOUT | LLAMA_SGD), Case({"tp": 2, "pp": 2} | SP, APART | DROPOUT | LLAMA_SGD),
]  # fmt: skip


def train_case(rank: int, cases: list[tuple[str, Any]], half: int = STEPS // 2) -> dict[str, Any]:
    """Train each case on this rank, two halves of so many steps; what it saw, by name."""
    from torch.distributed.tensor import DTensor

    from tptrain.mesh import build_mesh
    from tptrain.trainer import Trainer

    results = {}
    for name, config in cases:
        mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
        tokens = skewed_tokens(4000, config.model.vocab_size)
        if name.endswith(",ignored"):
            tokens[(np.arange(4000) // 11) % 4 == 0] = IGNORE_INDEX
        trainer = Trainer(config, mesh, Data.of_tokens(config, tokens[:3000], tokens[3000:], end_of_document=0))  # a sixth of the tokens

        def whole(trainer: Trainer = trainer) -> dict[str, torch.Tensor]:
            return {n: p.detach().full_tensor().clone() for n, p in trainer.share.named_parameters() if isinstance(p, DTensor)}

        start = {n: hashlib.sha256(w.numpy().tobytes()).hexdigest() for n, w in whole().items()}
        steps = [trainer.step() for _ in range(half)]
        val_loss = [trainer.evaluate()["val_loss"], trainer.evaluate()["val_loss"]]
        steps += [trainer.step() for _ in range(half)]
        results[name] = {
            "start": start, "loss": [s.loss for s in steps], "grad_norm": [s.grad_norm for s in steps],
            "sample": trainer.sample([3, 1, 2], 2, end=-1),
            "end": {n: w.norm().item() for n, w in whole().items()}, "val_loss": [*val_loss, trainer.evaluate()["val_loss"]],
        }  # fmt: skip
    return results


def train_alone(cases: list[Case], half: int = STEPS // 2) -> dict[str, Any]:
    """One process's result for each model and optimizer."""
    bases = {case.twin: case.config(alone=True) for case in cases}
    return run_ranks(1, train_case, list(bases.items()), half, timeout=540)[0]


def train_layouts(cases: list[Case], half: int = STEPS // 2) -> dict[str, list[Any]]:
    """Each rank's results of every case; one start of ranks for each number of processes."""
    results: dict[str, list[Any]] = {}
    for world in sorted({case.world for case in cases}):
        named = [(case.name, case.config()) for case in cases if case.world == world]
        for few in (named[first : first + 20] for first in range(0, len(named), 20)):  # each start has its time limit
            ranks = run_ranks(world, train_case, few, half, timeout=540)
            results |= {name: [rank[name] for rank in ranks] for name, _ in few}
    return results


def assert_equal(expected: dict[str, Any], ranks: list[Any]) -> None:
    """The promise, for one layout: each rank's results beside one process's."""
    steps = len(expected["loss"])
    assert len(set(expected["loss"])) == steps, "the twin must train"
    clipped = [norm for norm in expected["grad_norm"] if norm > 0.5]  # optimizer.grad_clip of the small config
    assert len(clipped) >= steps // 2, "clipping must be at work"
    names = set()
    for result in ranks:
        names |= result["start"].keys()
        assert result["start"] == {name: expected["start"][name] for name in result["start"]}, "initial weights differ"
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert result["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        assert result["val_loss"][0] == result["val_loss"][1], "an evaluation must change nothing"
        assert result["sample"] == expected["sample"]
        for name, norm in result["end"].items():
            if not name.endswith("k.bias"):  # its exact gradient is zero (softmax ignores a shift), and Adam scales what rounding leaves
                assert norm == pytest.approx(expected["end"][name], rel=1e-4, abs=1e-6), name
    assert names == expected["start"].keys(), "the stages together hold the whole model"


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return train_alone(CASES)


@pytest.fixture(scope="module")
def parallel() -> dict[str, list[Any]]:
    return train_layouts(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_one_process(case: Case, serial: dict[str, Any], parallel: dict[str, list[Any]]) -> None:
    assert serial[case.twin]["loss"][-1] < serial[case.twin]["loss"][0]
    assert_equal(serial[case.twin], parallel[case.name])
