"""What the ranks of `tptrain eval` do: the model from a checkpoint, losses of validation sets, likelihoods of choices."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.config import Config
from tptrain.data import Rows, Validation, open_validation
from tptrain.eval_config import EvalConfig
from tptrain.job import Job
from tptrain.mesh import Mesh, build_mesh, own_device
from tptrain.model.gpt import Execution
from tptrain.monitor.eval_progress import EvalProgress
from tptrain.multiple_choice.pairs import Pairs, pairs_path
from tptrain.row_losses import RowLosses, filled_up
from tptrain.tensor_parallel.parameter import DTYPES
from tptrain.trained_stage import load_stage


def evaluate(config: EvalConfig, folder: Path, store_dir: Path) -> dict[str, Any]:
    """Measure what the config asks for. Every rank calls this, with the process group up.

    config: with checkpoint.load a path and parallel.micro_batch_size a number. folder: the job's. store_dir: what `prepare` gave, if
    config.data is not None. Returns, alike on all ranks: `sets`, of each validation set by the key of its loss the summed loss in nats and
    the tokens; `weights`, of the sets in their mean; `choices`, of each file the log-likelihood of every pair in nats; `seconds`.
    """
    device = own_device(config.hardware.device)
    trained: Config = Job.load("train", Path(config.run), Path(config.run)).config
    layout = replace(trained.parallel, tp=config.parallel.tp, pp=config.parallel.pp, dp=config.parallel.dp, sequence_parallel=False)
    mesh = build_mesh(layout, device, config.launch.timeout_seconds)
    stage = load_stage(trained, Path(config.checkpoint.load), mesh, Execution(loss_chunk_tokens=trained.train.loss_chunk_tokens))
    rows, dtype = config.parallel.micro_batch_size, DTYPES[trained.train.precision]
    assert rows is not None, "the launcher has seen to it"
    began = time.perf_counter()
    sets, weights = {}, {}
    if config.data is not None:
        validation = open_validation(replace(trained, data=config.data, train=replace(trained.train, eval_steps=None)), store_dir)
        losses = RowLosses(stage, mesh, dtype, rows, separator(config, validation))
        most = None if config.eval_steps is None else config.eval_steps * trained.batch_size
        sets, weights = {key: total_loss(losses, part, most, key) for key, part in validation.rows.items()}, dict(validation.weights)
    # A context and a choice are one document, whatever training does with several in a row.
    losses = RowLosses(stage, mesh, dtype, rows)
    pairs = [Pairs.load(pairs_path(folder, number)) for number in range(len(config.files))]
    choices = [log_likelihoods(losses, one, file) for one, file in zip(pairs, config.files, strict=True)]
    return {"sets": sets, "weights": weights, "choices": choices, "seconds": time.perf_counter() - began}


def separator(config: EvalConfig, validation: Validation) -> int | None:
    """The id that ends documents, where they are to be kept apart."""
    assert config.data is not None
    return validation.end_of_document if config.data.document_mask else None


def total_loss(losses: RowLosses, rows: Rows, most: int | None, label: str) -> list[float]:
    """The summed loss in nats and the number of targets of a validation set, or of its first `most` samples; alike on all ranks."""
    assert rows.samples_per_epoch is not None, "a validation set has an end"
    samples = rows.samples_per_epoch if most is None else min(most, rows.samples_per_epoch)
    totals = torch.zeros(2, dtype=torch.float64, device=losses.mesh.device)
    with _progress(losses.mesh, label, samples) as progress:
        for first, own_first, own in losses.shares(samples):
            progress.reach(first)
            present = list(rows.rows(own_first, max(0, min(own, samples - own_first))))
            measured = losses(*filled_up(present, [len(row) - 1 for row in present], own))
            if measured is not None:
                totals += torch.stack([measured[0].sum(), measured[1].sum().double()])
    total, tokens = _sum_over_ranks(totals, losses.mesh).tolist()
    return [total, tokens]


def log_likelihoods(losses: RowLosses, pairs: Pairs, label: str) -> list[float]:
    """The log-probability of each pair's choice after its context, in nats; alike on all ranks."""
    order = pairs.longest_first()
    found = torch.zeros(len(pairs), dtype=torch.float64, device=losses.mesh.device)
    with _progress(losses.mesh, label, len(pairs)) as progress:
        for first, own_first, own in losses.shares(len(pairs)):
            progress.reach(first)
            numbers = order[own_first : own_first + own]
            rows, counted = [pairs.row(number) for number in numbers], [int(pairs.choice_tokens[number]) for number in numbers]
            measured = losses(*filled_up(rows, counted, own))
            if measured is not None:
                found[torch.from_numpy(numbers).to(found.device)] = -measured[0][: len(numbers)]
    values: list[float] = _sum_over_ranks(found, losses.mesh).tolist()
    return values


def _sum_over_ranks(values: Tensor, mesh: Mesh) -> Tensor:
    """The sum of what the ranks of the last stage know, which is the same on all tp ranks."""
    if mesh.tp_rank > 0:
        values.zero_()
    if mesh.world.size() > 1:
        dist.all_reduce(values, group=mesh.world)
    return values


def _progress(mesh: Mesh, label: str, total: int) -> EvalProgress:
    return EvalProgress(label, total, visible=mesh.world.rank() == 0)
