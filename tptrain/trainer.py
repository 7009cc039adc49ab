"""One rank's share of the model and the three things it does with it: a training step, an evaluation, a sample.

Data flows through `step` in the order in which the lines stand: rows of the global batch, the pipeline, the tied embedding's
sum, one norm over the whole model, clipping, the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.config import Config, refuse
from tptrain.data.dataset import Data
from tptrain.data.prefetch import Prefetch
from tptrain.data.rows import Rows
from tptrain.mesh import Mesh
from tptrain.model.documents import RowDocuments, targets_within
from tptrain.model.gpt import GPTStage
from tptrain.optim.grad_norm import clip_scale, scale_gradients, squared_norm
from tptrain.optim.guard import StepGuard
from tptrain.optim.lr_schedules import learning_rate
from tptrain.optim.optimizers import build_optimizer, set_lr
from tptrain.pipeline.actions import placement, with_transfers
from tptrain.pipeline.engine import PipelineEngine
from tptrain.pipeline.schedules import forward_only
from tptrain.pipeline.timeline import Span
from tptrain.pipeline.transfer import Transfer
from tptrain.plan.pipeline import schedule_of
from tptrain.share import ModelShare
from tptrain.tensor_parallel.broadcast import broadcast_from_first
from tptrain.tensor_parallel.collectives import gather_from_group
from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX
from tptrain.tensor_parallel.parameter import DTYPES
from tptrain.tensor_parallel.random import Stream


@dataclass
class StepResult:
    """What a step measured, still on the device: reading it waits for the step."""

    totals: Tensor
    """fp64 [4], summed over all ranks: squared gradient norm before clipping, summed loss in nats, tokens, ranks asked to stop."""
    lr: float
    verdict: Tensor | None = None
    """fp64 [2], what `StepGuard.judge` gives; None: the step was taken."""
    _copied: tuple[Tensor, torch.cuda.Event | None] | None = field(default=None, repr=False)

    def wait(self) -> None:
        """Return once the device has done the step."""
        self.totals.tolist()

    def begin_copy(self) -> None:
        """Begin to bring what `facts` reads to the host, without waiting for it."""
        assert self.verdict is not None
        facts = torch.cat((self.totals[3:], self.verdict))
        if facts.device.type == "cuda":
            host = torch.empty(len(facts), dtype=facts.dtype, pin_memory=True)
            host.copy_(facts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copied = host, event
        else:
            self._copied = facts, None

    def facts(self) -> tuple[bool, bool, bool]:
        """Whether a rank was asked to stop, whether the step was left out, whether its loss was a spike; the same on every rank.

        Waits for the step's gradient, but for nothing that the device was given after it.
        """
        assert self._copied is not None
        host, event = self._copied
        if event is not None:
            event.synchronize()
        stop, skipped, spike = (number != 0 for number in host.tolist())
        return stop, skipped, spike

    @property
    def loss(self) -> float:
        """Mean loss of the global batch in nats a token."""
        return float(self.totals[1] / self.totals[2])

    @property
    def grad_norm(self) -> float:
        """Norm of the whole model's gradient, before clipping."""
        return float(self.totals[0].sqrt())


class BrokenOff(Exception):
    """An evaluation or a sample was given up because the job was asked to stop."""


class Trainer:
    """This rank's share of the model, with its optimizer, its pipeline engine and its data."""

    def __init__(self, config: Config, mesh: Mesh, data: Data) -> None:
        """config: resolved. data: only the ranks of the first and last stage read it, with data.document_mask all do. Raises ConfigError
        where the mask needs an id that ends documents.
        """
        if config.data.document_mask and data.end_of_document is None:
            rule = "needs an id that ends documents, and the data has none"
            raise refuse("data.document_mask", True, rule, "use data.document_mask=false")
        self.separator = data.end_of_document if config.data.document_mask else None
        self.documents: list[RowDocuments] | None = None  # of the micro-batches read last, where they are kept apart
        self.config, self.mesh = config, mesh
        self.dtype = DTYPES[config.train.precision]
        schedule = schedule_of(config)
        self.ranks = placement(schedule)
        self.actions = schedule[mesh.pp_rank]
        self.share = ModelShare(config, mesh, self.ranks, self.dtype)
        self.optimizer = build_optimizer(config.optimizer, self.share.modules)
        self.guard = StepGuard(config.train.spike_factor, config.train.skip_spikes, mesh.device)
        self.asked: Callable[[], bool] = lambda: False  # whether this rank was asked to stop
        self.engine = self._engine(config.parallel.micro_batch_size, config.data.seq_len)

        self.data = data
        self.train_data = Prefetch(data.train, config.batch_size)
        self.steps_done = 0
        self.samples_done = 0
        self.skipped_steps = 0
        self.evaluation_due = False  # put off by a stop, and to be made before the next step

    # ---- the training step ---------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """One optimizer step on the next global batch."""
        return self.update(self.compute_gradients())

    def compute_gradients(self) -> Tensor:
        """Leave the next global batch's gradient in the parameters, summed over all ranks and not yet clipped.

        Returns the totals that `StepResult` describes.
        """
        self.share.begin(training=True)
        inputs, targets = self._micro_batches(self.train_data, self.samples_done)
        tokens = self._count_tokens(targets)
        loss = self.engine.train(self.actions, inputs, targets, 1 / tokens.clamp(min=1), self.share)
        self.share.sum_gradients()
        return self._totals(loss, tokens)

    def update(self, totals: Tensor) -> StepResult:
        """Clip what `compute_gradients` left, let the optimizer step, and clear the gradients.

        A step whose loss or gradient is no number leaves weights and optimizer as they are, and so does a spike with
        train.skip_spikes: the next step goes on with the next samples.
        """
        verdict = self.guard.judge(*totals[:3])
        if self.config.optimizer.grad_clip is not None:
            scale_gradients(self.share.gradients(), clip_scale(totals[0].sqrt(), self.config.optimizer.grad_clip))
        self.steps_done += 1
        self.samples_done += self.config.batch_size
        lr = learning_rate(self.steps_done, self.config.lr_schedule, self.config.optimizer.lr, self.config.train.max_steps)
        set_lr(self.optimizer, lr)
        if self.config.optimizer.name == "adamw":
            self.optimizer.found_inf = verdict[0].float()  # type: ignore[attr-defined]  # fused: it decides on the device
            self.optimizer.step()
        elif not verdict[0].item():  # SGD has to be told, so that a GPU is waited for
            self.optimizer.step()
        self.optimizer.zero_grad()
        result = StepResult(totals, lr, verdict)
        result.begin_copy()
        return result

    def read_ahead(self) -> None:
        """Begin to read what the next step needs, in the background; each step does so for those after it."""
        if self.reads:
            self.train_data.begin(*self._own_rows(self.samples_done))

    def progress(self) -> dict[str, Any]:
        """What a resume needs to know of the steps so far, as JSON, besides their number; the same on every rank."""
        return {"skipped_steps": self.skipped_steps, "evaluation_due": self.evaluation_due, "guard": self.guard.state()}

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Go on from what `progress` gave. What an older checkpoint lacks is as in the beginning."""
        self.skipped_steps, self.evaluation_due = progress.get("skipped_steps", 0), progress.get("evaluation_due", False)
        if "guard" in progress:
            self.guard.load_state(progress["guard"])

    def close(self) -> None:
        """Stop reading."""
        self.train_data.close()

    @property
    def spans(self) -> list[Span]:
        """What this rank computed when, in the last step."""
        return self.engine.spans

    def _count_tokens(self, targets: list[Tensor] | None) -> Tensor:
        """Tokens of the global batch that count, fp64 scalar; only the last stage's ranks, which make the loss, know them."""
        tokens = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.share.is_last and targets is not None:
            for target in targets:
                tokens += (target != IGNORE_INDEX).sum()
            if self.mesh.dp_size > 1:
                dist.all_reduce(tokens, group=self.mesh.dp_group)
        return tokens

    def _run_stage(self, stage: GPTStage, x: Tensor, targets: Tensor | None, micro_batch: int) -> Tensor:
        """A stage as the engine calls it: in training with the numbers of the samples that dropout belongs to."""
        documents = self.documents[micro_batch] if self.documents else None
        if not stage.training:
            return stage(x, targets, documents=documents)
        rows = self.config.batch_size // self.mesh.dp_size
        first = self.samples_done + self.mesh.dp_rank * rows + micro_batch * self.config.parallel.micro_batch_size
        stream = Stream(self.config.seed, first) if self.config.model.dropout else None
        return stage(x, targets, stream, self.config.train.label_smoothing, documents)

    def _totals(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """What `StepResult.totals` describes: one all-reduce over all ranks."""
        asked = torch.full_like(tokens, float(self.asked()))
        totals = torch.stack((squared_norm(self.share.counted_gradients(), self.mesh.device), loss, tokens, asked))
        if self.mesh.tp_rank > 0:  # the loss is the same on all tp ranks
            totals[1:3] = 0
        if self.mesh.dp_rank > 0:  # the count is already the whole batch's
            totals[2] = 0
        if self.mesh.world.size() > 1:
            dist.all_reduce(totals, group=self.mesh.world)
        return totals

    # ---- evaluation and sampling ---------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Mean losses in nats a token by their keys in metrics.jsonl, `val_loss` first.

        Each is over eval_steps global batches of its validation set (null: all of it): always the same samples.
        Raises BrokenOff, on all ranks alike, between two batches once a rank was asked to stop.
        """
        assert self.data.validation, "train.eval_steps is 0"
        self.share.begin(training=False)
        totals = torch.stack([self._evaluate(rows) for rows in self.data.validation.values()])
        self.share.release()
        if self.mesh.tp_rank > 0:
            totals.zero_()
        if self.mesh.world.size() > 1:
            dist.all_reduce(totals, group=self.mesh.world)
        return self.data.mean(dict(zip(self.data.validation, (totals[:, 0] / totals[:, 1]).tolist(), strict=True)))

    def _evaluate(self, data: Rows) -> Tensor:
        """This rank's part of one validation set, fp64 [2]: summed loss in nats, tokens."""
        batch, steps, samples = self.config.batch_size, self.config.train.eval_steps, data.samples_per_epoch
        assert samples is not None, "a validation set has an end"
        actions = with_transfers(forward_only(self.ranks, self.config.parallel.micro_batches))[self.mesh.pp_rank]
        totals = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for first in range(0, samples if steps is None else min(steps * batch, samples), batch):
            self._break_off_if_asked()
            inputs, targets = self._micro_batches(data, first, samples)
            for loss, target in zip(self.engine.infer(actions, inputs, targets), targets or (), strict=False):
                totals += torch.stack((loss.double(), (target != IGNORE_INDEX).sum().double()))
        return totals

    @torch.no_grad()
    def sample(self, prompt: list[int], count: int, end: int, temperature: float = 0.8) -> list[int]:
        """Up to `count` tokens that follow `prompt`, ended by token `end`; the same on every rank. Raises BrokenOff as `evaluate` does."""
        self.share.begin(training=False)
        self.documents = None  # the prompt and what follows it are one
        generator = torch.Generator().manual_seed(self.config.seed)
        tokens = list(prompt)
        actions = with_transfers(forward_only(self.ranks, 1))[self.mesh.pp_rank]
        while len(tokens) < len(prompt) + count:
            self._break_off_if_asked()
            context = torch.tensor([tokens[-self.config.data.seq_len :]], device=self.mesh.device)
            last = context.shape[1] - 1
            if self.config.parallel.sequence_parallel:  # what follows the last token changes nothing before it
                context = torch.nn.functional.pad(context, (0, -context.shape[1] % self.mesh.tp_size))
            outputs = self._engine(1, context.shape[1]).infer(actions, [context], None)
            following = torch.zeros((), dtype=torch.int64, device=self.mesh.device)
            if outputs:
                logits = gather_from_group(outputs[0][0, last].float(), self.mesh.tp_group, -1, self.config.model.vocab_size)
                probabilities = (logits / temperature).softmax(0).cpu()
                following += torch.multinomial(probabilities, 1, generator=generator).item()
            if self.mesh.pp_size > 1:
                dist.broadcast(following, self.mesh.pp_ranks[self.ranks[-1]], group=self.mesh.pp_up)
            if following.item() == end:
                break
            tokens.append(int(following))
        self.share.release()
        return tokens[len(prompt) :]

    def _break_off_if_asked(self) -> None:
        """Raise BrokenOff on all ranks where one was asked to stop: a sum on the CPU, for which no device is waited for."""
        asked = torch.tensor(float(self.asked()))
        if self.mesh.world.size() > 1:
            dist.all_reduce(asked, group=self.mesh.world)
        if asked:
            self.share.release()
            raise BrokenOff

    # ---- batches -------------------------------------------------------------------------------------------

    def _engine(self, rows: int, columns: int) -> PipelineEngine:
        """An engine for micro-batches [rows, columns]; under sequence parallelism stages send each other 1/tp of the columns."""
        columns //= self.mesh.tp_size if self.config.parallel.sequence_parallel else 1
        transfer = Transfer(self.mesh, (rows, columns, self.config.model.hidden_size), self.dtype)
        return PipelineEngine(
            {number: partial(self._run_stage, stage) for number, stage in self.share.stages.items()}, self.ranks, transfer
        )

    @property
    def reads(self) -> bool:
        """Whether this rank reads rows itself; the others of its tp group get them from the first."""
        return self._needs_rows and self.mesh.tp_rank == 0

    @property
    def _needs_rows(self) -> bool:
        """Whether this rank's stages take tokens or targets, or have to know the documents."""
        return self.share.is_first or self.share.is_last or self.separator is not None

    def _own_rows(self, first: int) -> tuple[int, int]:
        """First sample and count of this dp rank's share of the global batch that starts at sample `first`."""
        rows = self.config.batch_size // self.mesh.dp_size
        return first + rows * self.mesh.dp_rank, rows

    def _micro_batches(self, data: Rows, first: int, limit: int | None = None) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Inputs and targets of this dp rank's share of the global batch that starts at sample `first`.

        Two lists of [micro_batch_size, seq_len], or None on ranks that read no data. Samples from `limit` on are
        stand-ins whose targets count for nothing. With data.document_mask every stage needs the documents, which are left in
        `documents`.
        """
        if not self._needs_rows:
            return None, None
        first, rows = self._own_rows(first)
        batch = torch.full((rows, self.config.data.seq_len + 1), IGNORE_INDEX, device=self.mesh.device)
        if self.mesh.tp_rank == 0:
            present = rows if limit is None else max(0, min(rows, limit - first))
            batch[:present] = torch.from_numpy(data.rows(first, present)).to(self.mesh.device)
        broadcast_from_first([batch], self.mesh.tp_group)
        size = self.config.parallel.micro_batch_size
        inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
        if self.separator is not None:
            targets = targets_within(inputs, targets, self.separator)
            self.documents = [RowDocuments.of(rows, self.separator) for rows in inputs.split(size)]
        return list(inputs.split(size)), list(targets.split(size))
