"""A training step around the DTensor GPT that does what a step of `tptrain.trainer.Trainer` does, the way one writes it with torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.dtensor_gpt import GPT, parallelize
from tptrain.config import Config
from tptrain.data.sampler import Sampler


class DTensorTrainer:
    """The model, its optimizer and the same batches as a `Trainer` with this config. tp only; lr_schedule=constant."""

    def __init__(self, config: Config, mesh: DeviceMesh, weights: Mapping[str, Tensor], data: Sampler) -> None:
        """mesh: one-dimensional. weights: whole tensors under tptrain's names, the same on all ranks."""
        self.config, self.data, self.samples_done = config, data, 0
        self.model = GPT(config.model)
        self.model.load_state_dict(weights)
        parallelize(self.model, mesh, config.parallel.sequence_parallel)
        optimizer = config.optimizer
        # Fused and foreach updates take no mix of DTensors and plain tensors in one group.
        groups = [
            {"params": [p for p in part if (p.ndim >= 2) == decays], "weight_decay": optimizer.weight_decay if decays else 0.0}
            for part in by_kind(self.model.parameters())
            for decays in (True, False)
        ]
        betas = (optimizer.betas[0], optimizer.betas[1])
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=optimizer.lr, betas=betas, eps=optimizer.eps, fused=True)

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step on the next batch: its mean loss in nats a token, and the gradient norm before clipping."""
        rows = self.config.batch_size
        batch = torch.from_numpy(self.data.rows(self.samples_done, rows))
        size = self.config.parallel.micro_batch_size
        tokens = rows * self.config.data.seq_len
        losses = [self.micro_batch(part[:, :-1], part[:, 1:], tokens) for part in batch.split(size)]
        self.finish_gradients()
        norm = self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.samples_done += rows
        return torch.stack(losses).sum(), norm

    def micro_batch(self, inputs: Tensor, targets: Tensor, tokens: int) -> Tensor:
        """Forward and backward of inputs and targets [b, s]. Returns the summed loss over `tokens`, those of the global batch."""
        with loss_parallel():
            logits = self.model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens
            loss.backward()
        return loss.detach().to_local()

    def finish_gradients(self) -> None:
        """Sum the gradients that are still partial: those of norms that saw their part of the sequence. Left alone, the norm and the
        optimizer would each sum them."""
        for parameter in self.model.parameters():
            if isinstance(parameter.grad, DTensor) and parameter.grad.placements != parameter.placements:
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)

    def clip(self) -> Tensor:
        """Scale the gradients to a norm of at most grad_clip. Returns the norm before."""
        parts = [part for part in by_kind(self.model.parameters()) if part]
        norms = [get_total_norm([p.grad for p in part]) for part in parts]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        if self.config.optimizer.grad_clip is not None:
            for part in parts:
                clip_grads_with_norm_(part, self.config.optimizer.grad_clip, norm)
        return norm


def by_kind(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """DTensors, and the others."""
    both = list(tensors)
    return [t for t in both if isinstance(t, DTensor)], [t for t in both if not isinstance(t, DTensor)]
