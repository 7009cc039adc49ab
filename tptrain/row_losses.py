"""The loss of each row by a model that is split over stages: forwards alone, one global batch at a time.

    rows [n, s] of this dp rank ─ micro-batches ─ pipeline ─ last stage: each row's summed loss [n]

Rows of unequal length are filled up on their right with what counts for nothing. Attention is causal, so nothing before the filling
sees it, and a row's loss is that of the row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tptrain.mesh import Mesh
from tptrain.model.documents import RowDocuments, targets_within
from tptrain.model.gpt import GPTStage
from tptrain.pipeline.actions import with_transfers
from tptrain.pipeline.engine import PipelineEngine
from tptrain.pipeline.schedules import forward_only
from tptrain.pipeline.transfer import Transfer
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX

_FILLING = 4
"""Micro-batches for each stage of a pipeline: it then works at least 4/5 of the time."""


class RowLosses:
    """A model's forwards, under any layout. All ranks of the job call it alike."""

    def __init__(self, stage: GPTStage, mesh: Mesh, dtype: torch.dtype, micro_batch_size: int, separator: int | None = None) -> None:
        """stage: this rank's. dtype: of the activations. separator: the id that ends documents, where rows hold several that are
        to be kept apart."""
        self.stage, self.mesh, self.dtype = stage, mesh, dtype
        self.micro_batch_size, self.separator = micro_batch_size, separator
        self.micro_batches = 1 if mesh.pp_size == 1 else _FILLING * mesh.pp_size
        self._engine: PipelineEngine | None = None
        self._documents: list[RowDocuments] | None = None

    def shares(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """How `rows` rows are dealt out, a global batch at a time: the batch's first row, this rank's first row, and how many it computes.

        The last batch is as small as the layout lets it be; a rank's rows from `rows` on are stand-ins.
        """
        row_of_micro_batches = self.micro_batch_size * self.mesh.dp_size
        first = 0
        while first < rows:
            micro_batches = min(self.micro_batches, -(-(rows - first) // row_of_micro_batches))
            own = micro_batches * self.micro_batch_size
            yield first, first + self.mesh.dp_rank * own, own
            first += own * self.mesh.dp_size

    @torch.no_grad()
    def __call__(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """inputs, targets: ids [n, s] of this dp rank, a multiple of micro_batch_size, the same on all its ranks; IGNORE_INDEX where there
        is no target.

        Returns on the last stage, alike on its tp ranks, each row's summed loss in nats, fp64 [n], and its targets' number, int64 [n].
        """
        ids, wanted = (torch.from_numpy(rows).to(self.mesh.device) for rows in (inputs, targets))
        size = self.micro_batch_size
        self._documents = None
        if self.separator is not None:
            wanted = targets_within(ids, wanted, self.separator)
            self._documents = [RowDocuments.of(rows, self.separator) for rows in ids.split(size)]
        parts = ids.split(size)
        actions = with_transfers(forward_only(range(self.mesh.pp_size), len(parts)))[self.mesh.pp_rank]
        outputs = self._engine_for(ids.shape[1]).infer(actions, parts, wanted.split(size))
        return (torch.cat(outputs), (wanted != IGNORE_INDEX).sum(dim=1)) if self.stage.is_last else None

    def _run(self, x: Tensor, targets: Tensor | None, micro_batch: int) -> Tensor:
        """The stage as the engine calls it."""
        x = self.stage.trunk(x, documents=self._documents[micro_batch] if self._documents else None)
        if targets is None:
            return x
        losses = self.stage.token_losses(self.stage.final_norm(x), targets)
        return losses.view(targets.shape).double().sum(dim=1)

    def _engine_for(self, columns: int) -> PipelineEngine:
        """An engine for micro-batches of so many columns."""
        shape = (self.micro_batch_size, columns, self.stage.model.hidden_size)
        if self._engine is None or self._engine.transfer.shape != shape:
            transfer = Transfer(self.mesh, shape, self.dtype)
            self._engine = PipelineEngine({self.mesh.pp_rank: self._run}, range(self.mesh.pp_size), transfer)
        return self._engine


def filled_up(rows: Sequence[np.ndarray], counted: Sequence[int], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as inputs and next-token targets, int64 [number, longest - 1]; rows beyond those given are stand-ins.

    counted: of each row the ids at its end that are targets.

    >>> inputs, targets = filled_up([np.array([5, 6, 7]), np.array([8, 9])], [1, 1], 3)
    >>> inputs.tolist(), targets.tolist()
    ([[5, 6], [8, 0], [0, 0]], [[-100, 7], [9, -100], [-100, -100]])
    """
    columns = max(map(len, rows), default=2) - 1
    inputs = np.zeros((number, columns), dtype=np.int64)
    targets = np.full((number, columns), IGNORE_INDEX, dtype=np.int64)
    for place, (row, count) in enumerate(zip(rows, counted, strict=True)):
        inputs[place, : len(row) - 1] = row[:-1]
        targets[place, len(row) - 1 - count : len(row) - 1] = row[-count:]
    return inputs, targets
