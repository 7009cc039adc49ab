"""One step of the trainer against the arithmetic of the whole batch: what a mean is of, and what counts how often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tests.tensor_parallel.support import whole_gradient
from tptrain.config import Config
from tptrain.data.dataset import Data
from tptrain.mesh import build_mesh
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX
from tptrain.trainer import Trainer

SGD = {"optimizer__name": "sgd", "optimizer__grad_clip": None}  # AdamW would hide an error of scale


def trainer_of(config: Config, ignored: bool = False) -> Trainer:
    tokens = skewed_tokens(4000, config.model.vocab_size)
    if ignored:
        tokens[(np.arange(4000) // 11) % 4 == 0] = IGNORE_INDEX
    return Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, tokens[:3000], tokens[3000:]))


def batch_of(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """The global batch that the next step reads, in one process: inputs and targets [b, s]."""
    inputs, targets = trainer._micro_batches(trainer.train_data, trainer.samples_done)
    assert inputs is not None
    assert targets is not None
    return torch.cat(inputs), torch.cat(targets)


def token_losses(trainer: Trainer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Each token's loss by torch's own cross entropy, [b * s]; 0 where it does not count."""
    logits = trainer.share.stages[0](inputs).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


def test_targets_are_the_next_tokens_not_the_input() -> None:
    """A model that copies its input must not look as if it had learned."""
    run_ranks(1, check_targets)


def check_targets(rank: int) -> None:
    trainer = trainer_of(small_config())
    inputs, targets = batch_of(trainer)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (inputs != targets).float().mean() > 0.5
    stream = skewed_tokens(4000, 257)[:3000].tolist()
    text = ",".join(map(str, stream))
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert ",".join(map(str, [*row, target[-1]])) in text, "a row is a run of the data"


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_the_scale_is_applied_once_however_the_batch_is_cut(micro_batch_size: int) -> None:
    run_ranks(1, check_scale, micro_batch_size)


def check_scale(rank: int, micro_batch_size: int) -> None:
    trainer = trainer_of(small_config(parallel__micro_batch_size=micro_batch_size, **SGD))
    token_losses(trainer, *batch_of(trainer)).mean().backward()
    expected = {name: whole_gradient(parameter) for name, parameter in trainer.share.named_parameters()}
    trainer.optimizer.zero_grad()
    totals = trainer.compute_gradients()
    for name, parameter in trainer.share.named_parameters():
        torch.testing.assert_close(whole_gradient(parameter), expected[name], rtol=1e-4, atol=1e-6)
    assert totals[0].sqrt().item() == pytest.approx(sum(g.double().square().sum().item() for g in expected.values()) ** 0.5, rel=1e-5)
    before = {name: parameter.detach().full_tensor().clone() for name, parameter in trainer.share.named_parameters()}  # type: ignore[attr-defined]
    result = trainer.update(totals)
    decay = trainer.config.optimizer.weight_decay
    for name, parameter in trainer.share.named_parameters():
        step = expected[name] + (decay * before[name] if parameter.ndim > 1 else 0)
        after: Any = parameter.detach()
        torch.testing.assert_close(after.full_tensor(), before[name] - result.lr * step, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_mean_over_tokens_not_of_micro_batches_means() -> None:
    run_ranks(1, check_mean)


def check_mean(rank: int) -> None:
    trainer = trainer_of(small_config(**SGD), ignored=True)
    inputs, targets = batch_of(trainer)
    losses = token_losses(trainer, inputs, targets).detach().double()
    counts = [(part != IGNORE_INDEX).sum().item() for part in targets.split(2)]
    assert len(set(counts)) > 1, "micro-batches must count different numbers of tokens"
    means = [part.sum() / count for part, count in zip(losses.split(2 * targets.shape[1]), counts, strict=True)]
    over_tokens, of_means = float(losses.sum() / sum(counts)), float(sum(means) / len(means))
    assert abs(over_tokens - of_means) > 1e-4 * over_tokens, "else this test can tell nothing"
    assert trainer.step().loss == pytest.approx(over_tokens, rel=1e-6)


def test_a_tied_embedding_on_two_stages_counts_once_and_has_one_gradient() -> None:
    config = small_config(**SGD)
    (expected,) = run_ranks(1, embedding_gradient, config)
    first, last = run_ranks(2, embedding_gradient, small_config(parallel__pp=2, **SGD))
    assert first["gradient"] == last["gradient"], "the two copies would drift apart"
    assert first["gradient"] == pytest.approx(expected["gradient"], rel=1e-4, abs=1e-7)
    for rank in (first, last):
        assert rank["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def embedding_gradient(rank: int, config: Config) -> dict[str, Any]:
    trainer = trainer_of(config)
    totals = trainer.compute_gradients()
    gradient = whole_gradient(next(iter(trainer.share.stages.values())).embedding.weight)
    return {"norm": totals[0].sqrt().item(), "gradient": gradient.flatten()[:: gradient.numel() // 500].tolist()}
