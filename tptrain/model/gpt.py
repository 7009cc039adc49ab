"""A GPT, or the contiguous run of its layers that one pipeline stage holds.

    tokens ─ embedding ─ + positions ─ [ x + attention(norm(x)) ─ x + mlp(norm(x)) ] * num_layers ─ norm ─ head ─ loss
             └───────── first stage ──┘└──────────── each stage, its layers ───────┘└──── last stage ────┘

Two families by config: GPT-2's (Radford et al. 2019: learned positions, LayerNorm, GELU, biases) and Llama's (Touvron et al.
2023: rotary positions inside attention, RMSNorm, SwiGLU, grouped key/value heads, no biases).

Parameters keep the names they have in the whole model (`layers.17.mlp.up.weight`) on whatever stage they live.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tptrain.config import ModelConfig
from tptrain.model.attention import Attention
from tptrain.model.documents import Apart, RowDocuments
from tptrain.model.mlp import MLP
from tptrain.model.norm import NORMS
from tptrain.model.recompute import forgetting, remade
from tptrain.model.rotary import Rotation, rotation
from tptrain.tensor_parallel.collectives import SEQUENCE, copy_to_group, gather_from_sequence
from tptrain.tensor_parallel.cross_entropy import Vocabulary, chunked_cross_entropy, vocab_parallel_cross_entropy
from tptrain.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding, head_of, look_up
from tptrain.tensor_parallel.linear import column_linears
from tptrain.tensor_parallel.parameter import LabelledModule, labelled_parameter
from tptrain.tensor_parallel.random import Stream, dropout
from tptrain.tensor_parallel.scratch import Scratch


@dataclass(frozen=True)
class Execution:
    """How a stage computes what its model says; no choice here changes the result."""

    sequence_parallel: bool = False
    """Split what lies between the split layers over tp along the sequence."""
    recompute: str = "none"
    """What is made again in backward, see `recompute.py`."""
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at a time in the loss; None means all."""


class Block(nn.Module):
    """One pre-norm transformer block. [b, s, h] -> [b, s, h]."""

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device, execution: Execution) -> None:
        super().__init__()
        sequence, self.recompute = execution.sequence_parallel, execution.recompute
        selective = execution.recompute == "selective"
        self.dropout, self.sequence_group = model.dropout, tp.get_group() if sequence else None
        self.attention_norm = NORMS[model.norm](model, tp, device, sequence)
        self.attention = Attention(model, tp, device, sequence, selective)
        self.mlp_norm = NORMS[model.norm](model, tp, device, sequence)
        self.mlp = MLP(model, tp, device, sequence, selective)

    def forward(self, x: Tensor, turn: Rotation | None = None, stream: Stream | None = None, apart: Apart | None = None) -> Tensor:
        """x: [b, s, h] -> the same; under sequence parallelism [b, s/tp, h]. turn, stream and apart: see `Attention`."""
        return remade(self.run, x, turn, stream, apart) if self.recompute == "full" else self.run(x, turn, stream, apart)

    def run(self, x: Tensor, turn: Rotation | None, stream: Stream | None, apart: Apart | None) -> Tensor:
        """The block itself."""
        attention_stream, mlp_stream = (stream.at("attention"), stream.at("mlp")) if stream else (None, None)
        normed, before = self.attention_norm(x), x.detach()
        with forgetting(normed, lambda: self.attention_norm(before), self.recompute == "selective"):
            y = self.attention(normed, turn, attention_stream, apart)
        x = x + dropout(y, self.dropout, attention_stream, self.sequence_group)
        normed, between = self.mlp_norm(x), x.detach()
        with forgetting(normed, lambda: self.mlp_norm(between), self.recompute == "selective"):
            y = self.mlp(normed)
        return x + dropout(y, self.dropout, mlp_stream, self.sequence_group)


class Positions(LabelledModule):
    """Learned position embeddings, replicated. [b, s, h] -> [b, s, h], or this rank's part of the sequence -> the same."""

    def __init__(self, model: ModelConfig, tp: DeviceMesh, device: torch.device, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = labelled_parameter((model.max_seq_len, model.hidden_size), None, tp, device)
        self.part_of_sequence = tp.get_local_rank() if sequence_parallel else 0
        if sequence_parallel:
            self.partial_gradients = ("weight",)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x: [b, s, h] -> x plus the embedding of each position. positions: of the whole sequence [b, s], where rows have their own."""
        first = self.part_of_sequence * x.shape[SEQUENCE]
        if positions is not None:
            own = positions[:, first : first + x.shape[SEQUENCE]]
            return x + look_up(self.weight, self.values("weight"), own).to(x.dtype)
        return x + self.part("weight")[first : first + x.shape[SEQUENCE]].to(x.dtype)


class GPTStage(nn.Module):
    """Layers `first_layer` to `last_layer` (exclusive) of a GPT, split over `tp`.

    The stage with layer 0 also holds the embedding and the positions, the one with the last layer also the final norm
    and the head. With tied embeddings the last stage of several holds its own copy of `embedding.weight`.
    Values are uninitialised; see `init.py`.
    """

    def __init__(
        self,
        model: ModelConfig,
        first_layer: int,
        last_layer: int,
        tp: DeviceMesh,
        device: torch.device,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__()
        self.model, self.execution, self.group = model, execution, tp.get_group()
        self.is_first, self.is_last = first_layer == 0, last_layer == model.num_layers
        self.scratch = Scratch()
        sequence = execution.sequence_parallel
        self.sequence_group = self.group if sequence else None
        if self.is_first or (self.is_last and model.tie_embeddings):
            self.embedding = VocabParallelEmbedding(model.vocab_size, model.hidden_size, tp, device, sequence_parallel=sequence)
        if self.is_first and model.position == "learned":
            self.positions = Positions(model, tp, device, sequence)
        self.layers = nn.ModuleDict({str(i): Block(model, tp, device, execution) for i in range(first_layer, last_layer)})
        self.head: ColumnParallelLinear | None = None
        if self.is_last:
            self.final_norm = NORMS[model.norm](model, tp, device, sequence)
            if not model.tie_embeddings:
                self.head = ColumnParallelLinear(model.hidden_size, model.vocab_size, False, tp, device, sequence_parallel=sequence)

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        stream: Stream | None = None,
        label_smoothing: float = 0.0,
        documents: RowDocuments | None = None,
    ) -> Tensor:
        """Run the stage.

        x: token ids [b, s] on the first stage, else the activations [b, s, h] of the stage before.
        targets: [b, s], on the last stage in training and evaluation. stream: what dropout draws from; None: no dropout.
        documents: the micro-batch's, where they are to be kept apart; on every stage. None: a row is one document.
        Returns activations [b, s, h]; on the last stage the summed loss in nats (fp32 scalar), or without targets
        this rank's logits [b, s, vocab/tp]. Under sequence parallelism activations are [b, s/tp, h].
        """
        x = self.trunk(x, stream, documents)
        if not self.is_last:
            return x
        x = self.final_norm(x)
        return self.logits(x) if targets is None else self.loss(x, targets, label_smoothing)

    def trunk(self, x: Tensor, stream: Stream | None = None, documents: RowDocuments | None = None) -> Tensor:
        """All but the final norm and the head: activations [b, s, h]. The arguments are those of `forward`."""
        if self.is_first:
            x = self.embed(x, stream, documents)
        turn, apart = self.rotation(x, documents), None
        if documents is not None:
            apart = documents.apart(x.dtype, self.model.head_size, as_mask=self.model.dropout > 0 and stream is not None)
        for name, block in self.layers.items():
            x = block(x, turn, stream.at(f"layers.{name}") if stream else None, apart)
        return x

    def embed(self, tokens: Tensor, stream: Stream | None = None, documents: RowDocuments | None = None) -> Tensor:
        """tokens: [b, s] -> activations [b, s, h], or [b, s/tp, h] under sequence parallelism."""
        x = self.embedding(tokens)
        if self.model.position == "learned":
            x = self.positions(x, documents.positions if documents else None)
        return dropout(x, self.model.dropout, stream.at("embedding") if stream else None, self.sequence_group)

    def rotation(self, x: Tensor, documents: RowDocuments | None = None) -> Rotation | None:
        """What the blocks turn q and k by, for activations x that begin the sequence, or with the positions of `documents`."""
        if self.model.position != "rope":
            return None
        if documents is not None:
            return rotation(documents.positions.unsqueeze(1), self.model.head_size, self.model.rope_theta)
        length = x.shape[SEQUENCE] * (self.sequence_group.size() if self.sequence_group else 1)
        return rotation(torch.arange(length, device=x.device), self.model.head_size, self.model.rope_theta)

    def logits(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """x: [b, s, h], or this rank's part of the sequence -> this rank's logits [b, s, vocab/tp]. scratch: their memory."""
        return column_linears(x, [head_of(self.head or self.embedding, scratch)], self.group, self.execution.sequence_parallel)[0]

    def loss(self, x: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """The sum of the tokens' losses in nats, an fp32 scalar equal on all tp ranks. x: as in `logits`."""
        return self.token_losses(x, targets, label_smoothing).sum()

    def token_losses(self, x: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Each token's loss in nats, fp32 [b * s], equal on all tp ranks; 0 where there is no target. x: as in `logits`."""
        vocabulary = Vocabulary(self.vocab_start, self.model.vocab_size, self.group)
        chunk = self.execution.loss_chunk_tokens
        if chunk is None:
            goes_back = torch.is_grad_enabled() and x.device.type == "cpu"  # a GPU's allocator keeps memory itself
            logits = self.logits(x, self.scratch if goes_back else None).flatten(0, 1)
            return vocab_parallel_cross_entropy(logits, targets.flatten(), vocabulary, label_smoothing, overwrite=True)
        x = gather_from_sequence(x, self.group, True) if self.execution.sequence_parallel else copy_to_group(x, self.group)
        head = head_of(self.head or self.embedding)
        return chunked_cross_entropy(x.flatten(0, 1), head, targets.flatten(), vocabulary, label_smoothing, chunk)

    @property
    def vocab_start(self) -> int:
        """The token whose logit is this rank's first, on the last stage."""
        return self.embedding.start if self.head is None else self.head.row_start
