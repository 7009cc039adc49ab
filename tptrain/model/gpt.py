"""A GPT, or the contiguous run of its layers that one pipeline stage holds (GPT-2's shape, Radford et al. 2019).

    tokens ─ embedding ─ + positions ─ [ x + attention(norm(x)) ─ x + mlp(norm(x)) ] * num_layers ─ norm ─ head ─ loss
             └───────── first stage ──┘└──────────── each stage, its layers ───────┘└──── last stage ────┘

Parameters keep the names they have in the whole model (`layers.17.mlp.up.weight`) on whatever stage they live.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ModelConfig
from tptrain.model.attention import Attention
from tptrain.model.mlp import MLP
from tptrain.model.norm import LayerNorm
from tptrain.tensor_parallel.collectives import copy_to_group
from tptrain.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from tptrain.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from tptrain.tensor_parallel.parameter import LabelledModule, labelled_parameter


class Block(nn.Module):
    """One pre-norm transformer block. [b, s, h] -> [b, s, h]."""

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(model, tp, device)
        self.attention = Attention(model, tp, device)
        self.mlp_norm = LayerNorm(model, tp, device)
        self.mlp = MLP(model, tp, device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Positions(LabelledModule):
    """Learned position embeddings, replicated. [b, s, h] -> [b, s, h]."""

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.weight = labelled_parameter((model.max_seq_len, model.hidden_size), None, tp, device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> x plus the embedding of each position."""
        return x + F.embedding(torch.arange(x.shape[1], device=x.device), self.part("weight"))


class GPTStage(nn.Module):
    """Layers `first_layer` to `last_layer` (exclusive) of a GPT, split over `tp`.

    The stage with layer 0 also holds the embedding and the positions, the one with the last layer also the final norm
    and the head. With tied embeddings the last stage of several holds its own copy of `embedding.weight`.
    Values are uninitialised; see `init.py`.
    """

    def __init__(self, model: ModelConfig, first_layer: int, last_layer: int, tp: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.is_first, self.is_last = first_layer == 0, last_layer == model.num_layers
        self.group = tp.get_group()
        if self.is_first or (self.is_last and model.tie_embeddings):
            self.embedding = VocabParallelEmbedding(model.vocab_size, model.hidden_size, tp, device)
        if self.is_first:
            self.positions = Positions(model, tp, device)
        self.layers = nn.ModuleDict({str(i): Block(model, tp, device) for i in range(first_layer, last_layer)})
        if self.is_last:
            self.final_norm = LayerNorm(model, tp, device)
            self.head = None if model.tie_embeddings else ColumnParallelLinear(model.hidden_size, model.vocab_size, False, tp, device)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run the stage.

        x: token ids [b, s] on the first stage, else the activations [b, s, h] of the stage before.
        targets: [b, s], on the last stage in training and evaluation.
        Returns activations [b, s, h]; on the last stage the summed loss in nats (fp32 scalar), or without targets
        this rank's logits [b, s, vocab/tp].
        """
        if self.is_first:
            x = self.positions(self.embedding(x))
        for block in self.layers.values():
            x = block(x)
        if not self.is_last:
            return x
        logits = self.logits(self.final_norm(x))
        return logits if targets is None else self.loss(logits, targets)

    def logits(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> this rank's logits [b, s, vocab/tp]."""
        if self.head is not None:
            return self.head(x)
        return F.linear(copy_to_group(x, self.group), self.embedding.part("weight"))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of the tokens' losses in nats, an fp32 scalar equal on all tp ranks."""
        return vocab_parallel_cross_entropy(logits.flatten(0, 1), targets.flatten(), self.vocab_start, self.group).sum()

    @property
    def vocab_start(self) -> int:
        """The token whose logit is this rank's first, on the last stage."""
        return self.embedding.start if self.head is None else self.head.row_start
