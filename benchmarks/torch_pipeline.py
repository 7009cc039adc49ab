"""A pipeline of torch.distributed.pipelining around the plain GPT of `dtensor_gpt.py`, used the way torchtitan uses it.

Dynamic shape inference (each stage runs the first micro-batch once more, in the first step only), outputs that nobody gathers, a
mean loss that is divided by the number of micro-batches in the loss function, which is cheaper than the default `scale_grads`
(a pass over all gradients), clipping by one norm over all stages, fused AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.dtensor_gpt import GPT
from tptrain.config import Config, ModelConfig
from tptrain.data.sampler import Sampler


@dataclass(frozen=True)
class Peer:
    """A schedule of torch and where its stages lie on two ranks."""

    name: str
    schedule: type
    stages: tuple[tuple[int, ...], ...]
    """The stages of each rank."""


PEERS = {
    "gpipe": Peer("torch GPipe", ScheduleGPipe, ((0,), (1,))),
    "1f1b": Peer("torch 1F1B", Schedule1F1B, ((0,), (1,))),
    "interleaved": Peer("torch Interleaved1F1B", ScheduleInterleaved1F1B, ((0, 2), (1, 3))),
    "zb_v": Peer("torch ZBVZeroBubble", ScheduleZBVZeroBubble, ((0, 3), (1, 2))),
}
"""By tptrain's name of the same schedule."""


class Stage(nn.Module):
    """A run of a GPT's layers; the first stage also embeds, the last also has the final norm and the head."""

    def __init__(self, model: ModelConfig, layers: list[int], weights: Mapping[str, Tensor]) -> None:
        """weights: of the whole model; this stage copies its own."""
        super().__init__()
        with torch.device("meta"):
            whole = GPT(model)
        self.is_first, self.is_last = 0 in layers, model.num_layers - 1 in layers
        if self.is_first:
            self.embedding, self.positions = whole.embedding, whole.positions
        self.layers = nn.ModuleDict({str(i): whole.layers[str(i)] for i in layers})
        if self.is_last:
            self.final_norm, self.head = whole.final_norm, whole.head
        self.load_state_dict({name: weights[name].clone() for name in self.state_dict()}, assign=True)
        self.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        """x: token ids [b, s] on the first stage, else activations [b, s, h] -> activations, or logits [b, s, vocab] on the last."""
        if self.is_first:
            x = self.embedding(x) + self.positions(torch.arange(x.shape[1], device=x.device).unsqueeze(0))
        for block in self.layers.values():
            x = block(x)
        return self.head(self.final_norm(x)) if self.is_last else x


class TorchPipeline:
    """This rank's stages, their optimizer and the same batches as a `Trainer` with this config. pp only; lr_schedule=constant."""

    def __init__(self, config: Config, peer: Peer, weights: Mapping[str, Tensor], data: Sampler) -> None:
        """weights: whole tensors under tptrain's names, the same on all ranks. Every rank calls this."""
        self.config, self.data, self.samples_done = config, data, 0
        rank, num_stages = dist.get_rank(), sum(map(len, peer.stages))
        layers = [part.tolist() for part in torch.arange(config.model.num_layers).tensor_split(num_stages)]  # the split `even`
        self.group = dist.new_group(list(range(dist.get_world_size())))
        modules = {stage: Stage(config.model, layers[stage], weights) for stage in peer.stages[rank]}
        stages = [PipelineStage(module, stage, num_stages, torch.device("cpu"), group=self.group) for stage, module in modules.items()]
        self.has_first, self.has_last = 0 in modules, num_stages - 1 in modules
        self.parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        self.schedule = peer.schedule(
            stages if issubclass(peer.schedule, PipelineScheduleMulti) else stages[0],
            n_microbatches=config.parallel.micro_batches,
            loss_fn=self.loss,
            scale_grads=False,
        )
        optimizer = config.optimizer
        groups = [
            {"params": [p for p in self.parameters if (p.ndim >= 2) == decays], "weight_decay": optimizer.weight_decay if decays else 0.0}
            for decays in (True, False)
        ]
        betas = (optimizer.betas[0], optimizer.betas[1])
        self.optimizer = torch.optim.AdamW(groups, lr=optimizer.lr, betas=betas, eps=optimizer.eps, fused=True)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's share of the mean loss, in nats a token. logits: [b, s, vocab]; targets: [b, s]."""
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / self.config.parallel.micro_batches

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step on the next batch: its mean loss in nats a token (zero off the last stage), and the gradient norm."""
        batch = torch.from_numpy(self.data.rows(self.samples_done, self.config.batch_size))
        losses: list[Tensor] = []
        inputs = (batch[:, :-1],) if self.has_first else ()
        self.schedule.step(*inputs, target=batch[:, 1:] if self.has_last else None, losses=losses, return_outputs=False)
        norm = self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.samples_done += self.config.batch_size
        return torch.stack(losses).detach().sum() if losses else torch.zeros(()), norm

    def clip(self) -> Tensor:
        """Scale the gradients to a norm of at most grad_clip. Returns the norm before, which is the whole model's."""
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True).square()
        dist.all_reduce(norm, group=self.group)
        norm = norm.sqrt()
        if self.config.optimizer.grad_clip is not None:
            clip_grads_with_norm_(self.parameters, self.config.optimizer.grad_clip, norm, foreach=True)
        return norm
