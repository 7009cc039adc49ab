"""Inference with a model that is split over the ranks of a pipeline.

Rows are independent, so the batch is cut into as many micro-batches as there are stages, or rows if these are fewer. They follow one
another through the stages; each has a `Decoder` of its own on every stage, and with it a cache of that stage's layers:

    stage 0   F0 F1
    stage 1      F0 F1 ─ logits of all rows ─ tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from tptrain.mesh import Mesh
from tptrain.model.decode import Decoder
from tptrain.model.gpt import GPTStage
from tptrain.pipeline.actions import with_transfers
from tptrain.pipeline.engine import PipelineEngine, Stage
from tptrain.pipeline.partition import even_partition
from tptrain.pipeline.schedules import forward_only
from tptrain.pipeline.transfer import Transfer


class PipelineDecoder:
    """A model, whole or in stages, that reads on where it stopped. All ranks of the job call it alike."""

    def __init__(self, stage: GPTStage, mesh: Mesh, batch_size: int, max_tokens: int) -> None:
        """stage: this rank's. max_tokens: of a row, padding included. Raises ValueError for too many, and for a mesh with dp > 1."""
        if mesh.dp_size > 1:
            raise ValueError(f"a PipelineDecoder serves one batch, and dp={mesh.dp_size} has several")
        self.stage, self.mesh, self.group, self.device = stage, mesh, mesh.world, mesh.device
        self.bounds = even_partition(batch_size, min(mesh.pp_size, batch_size))
        """Each micro-batch's rows, as (first, one past last)."""
        self.rows = max(stop - first for first, stop in self.bounds)
        """Rows that each micro-batch computes, as stages send each other one shape: a smaller one begins with rows of the one before
        it, whose results are dropped."""
        self.decoders = [Decoder(stage, self.rows, max_tokens) for _ in self.bounds]
        self.actions = with_transfers(forward_only(range(mesh.pp_size), len(self.bounds)))[mesh.pp_rank]

    def __call__(self, tokens: Tensor, padding: Tensor | None = None, /) -> Tensor | None:
        """Read `tokens` [b, t] behind all earlier ones; the same on all ranks.

        padding: [b], with the first call: the tokens at each row's left that are none.
        Returns, on the last stage, this rank's logits of each row's last token, [b, vocab/tp].
        """

        def run(x: Tensor, targets: Tensor | None, micro_batch: int) -> Tensor:
            return self.decoders[micro_batch](x, None if padding is None else self._parts(padding)[micro_batch])

        outputs = self._engine(run, tokens.shape[1]).infer(self.actions, self._parts(tokens), None)
        if not outputs:
            return None
        return torch.cat([output[first - stop :] for output, (first, stop) in zip(outputs, self.bounds, strict=True)])

    def _parts(self, batch: Tensor) -> list[Tensor]:
        """What each micro-batch computes of a batch, views of [rows, ...]."""
        return [batch[stop - self.rows : stop] for _, stop in self.bounds]

    def _engine(self, run: Stage, tokens: int) -> PipelineEngine:
        """An engine for micro-batches of so many tokens a row."""
        shape = (self.rows, tokens, self.stage.model.hidden_size)
        transfer = Transfer(self.mesh, shape, self.decoders[0].dtype)
        return PipelineEngine({self.mesh.pp_rank: run}, range(self.mesh.pp_size), transfer)
