"""One step of the trainer against the arithmetic of the whole batch: what a mean is of, and what counts how often."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tests.tensor_parallel.support import whole_gradient
from tptrain.config import Config, ConfigError
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


# ---- documents kept apart ----------------------------------------------------------------------------------

END = 3
APART = {"data__document_mask": True, "data__source": "python_docs"}


def test_the_loss_is_of_each_document_alone() -> None:
    run_ranks(1, check_documents)


def check_documents(rank: int) -> None:
    """The step's loss, and the evaluation's, is the mean over the targets within documents, each document run alone."""
    config = small_config(**SGD, **APART)
    tokens = skewed_tokens(4000, config.model.vocab_size)
    mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
    trainer = Trainer(config, mesh, Data.of_tokens(config, tokens[:3000], tokens[3000:], END))
    rows = trainer.train_data.rows(0, 8)
    apart, together = losses_alone(trainer, rows), token_losses(trainer, *(torch.from_numpy(x) for x in (rows[:, :-1], rows[:, 1:])))
    assert abs(together.mean().item() - sum(apart) / len(apart)) > 1e-3, "else this test can tell nothing"
    assert trainer.step().loss == pytest.approx(sum(apart) / len(apart), rel=1e-5)
    steps = trainer.config.train.eval_steps
    held_out = losses_alone(trainer, trainer.data.validation["val_loss"].rows(0, 8 * (steps or 0)))
    assert trainer.evaluate()["val_loss"] == pytest.approx(sum(held_out) / len(held_out), rel=1e-5)


@torch.no_grad()
def losses_alone(trainer: Trainer, rows: np.ndarray) -> list[float]:
    """The losses of all tokens that another of their document comes before, in rows cut behind each end id."""
    losses: list[float] = []
    for row in rows:
        cuts = [0, *(np.flatnonzero(row == END) + 1).tolist(), len(row)]
        for first, last in itertools.pairwise(cuts):
            if last - first > 1:
                document = torch.from_numpy(row[None, first:last])
                losses += token_losses(trainer, document[:, :-1], document[:, 1:]).tolist()
    return losses


def test_the_mask_needs_an_end_id() -> None:
    run_ranks(1, check_no_end)


def check_no_end(rank: int) -> None:
    config = small_config(**APART)
    tokens, mesh = skewed_tokens(400, config.model.vocab_size), build_mesh(config.parallel, torch.device("cpu"), 60)
    with pytest.raises(ConfigError, match=r"data.document_mask=true needs an id that ends documents.*: use data.document_mask=false"):
        Trainer(config, mesh, Data.of_tokens(config, tokens))
    Trainer(small_config(), mesh, Data.of_tokens(small_config(), tokens))


def test_a_sample_is_one_document() -> None:
    """Its prompt may hold end ids; and what the step before read has no part in it."""
    run_ranks(1, check_sample)


def check_sample(rank: int) -> None:
    config = small_config(**APART)
    tokens, mesh = skewed_tokens(4000, config.model.vocab_size), build_mesh(config.parallel, torch.device("cpu"), 60)
    apart = Trainer(config, mesh, Data.of_tokens(config, tokens, end_of_document=END))
    apart.step()
    prompt = [END, 9, 4, END, 8]
    with mock.patch.object(apart.share.stages[0], "forward", wraps=apart.share.stages[0].forward) as forward:
        apart.sample(prompt, 3, end=-1)
    assert len(forward.call_args_list) == 3
    assert all(call.kwargs.get("documents") is None for call in forward.call_args_list)
