"""A GPT of torch.nn alone, and its tensor parallelism by PyTorch's own `parallelize_module`: what ours is timed against.

The plan is the one that torchtitan uses for its dense models: column-parallel q, k, v and up, row-parallel out and down, a
vocabulary that is split in the embedding and in the head, logits that stay split for `loss_parallel`. Between blocks the
activations are plain tensors, as DTensor's dispatch costs time on each operation. Parameters have the names they have in
`tptrain.model.gpt.GPTStage`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tptrain.config import ModelConfig


class Attention(nn.Module):
    """Causal multi-head attention; after `parallelize` q, k and v hand out this rank's heads. [b, s, h] -> [b, s, h]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_size = model.head_size
        self.q, self.k, self.v, self.out = (nn.Linear(model.hidden_size, model.hidden_size, model.bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> the same."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(gelu(up(x))). [b, s, h] -> [b, s, h]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(model.hidden_size, model.ffn_hidden_size, model.bias)
        self.down = nn.Linear(model.ffn_hidden_size, model.hidden_size, model.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> the same."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block. [b, s, h] -> [b, s, h]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(model.hidden_size, model.norm_eps, bias=model.bias)
        self.attention = Attention(model)
        self.mlp_norm = nn.LayerNorm(model.hidden_size, model.norm_eps, bias=model.bias)
        self.mlp = MLP(model)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The whole model, with a head of its own."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.positions = nn.Embedding(model.max_seq_len, model.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(model) for i in range(model.num_layers)})
        self.final_norm = nn.LayerNorm(model.hidden_size, model.norm_eps, bias=model.bias)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [b, s] -> logits [b, s, vocab]; after `parallelize` a DTensor split over the vocabulary."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0))
        for block in self.layers.values():
            x = block(x)
        return self.head(self.final_norm(x))


def parallelize(model: GPT, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Split `model` over a one-dimensional mesh; each rank holds the same whole model before. Parameters become DTensors, except
    those that no plan names, which are equal on all ranks and have equal gradients."""
    parallelize_module(model, mesh, _sequence_outer_plan() if sequence_parallel else _outer_plan())
    for block in model.layers.values():
        parallelize_module(block, mesh, _sequence_block_plan() if sequence_parallel else _block_plan())


def _outer_plan() -> dict[str, ParallelStyle]:
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(use_local_output=False),
    }


def _block_plan() -> dict[str, ParallelStyle]:
    return {
        # One DTensor for q, k and v: their gradients are added while still partial, so that one all-reduce serves all three.
        "attention": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.out": RowwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }


def _sequence_outer_plan() -> dict[str, ParallelStyle]:
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "positions": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
        "final_norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    }


def _sequence_block_plan() -> dict[str, ParallelStyle]:
    gather = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(**gather),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(**gather),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
