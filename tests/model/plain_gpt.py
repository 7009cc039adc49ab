"""A GPT written with torch.nn alone: the twin that the split one is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tensor_parallel.support import fill, random
from tptrain.config import ModelConfig


class PlainBlock(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, self.heads = model.hidden_size, model.num_heads
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(hidden, model.norm_eps, bias=model.bias) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden, model.bias) for _ in range(4))
        self.up = nn.Linear(hidden, model.ffn_hidden_size, model.bias)
        self.down = nn.Linear(model.ffn_hidden_size, hidden, model.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        normed = self.attention_norm(x)
        q, k, v = (layer(normed).view(b, s, self.heads, h // self.heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.positions = nn.Embedding(model.max_seq_len, model.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(model) for _ in range(model.num_layers))
        self.final_norm = nn.LayerNorm(model.hidden_size, model.norm_eps, bias=model.bias)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [b, s] -> logits [b, s, vocab]."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def our_name(name: str) -> str:
    """What a parameter of PlainGPT is called in GPTStage."""
    if not name.startswith("blocks."):
        return name
    _, layer, part, kind = name.split(".")
    room = {"up": "mlp.", "down": "mlp."}.get(part, "" if part.endswith("norm") else "attention.")
    return f"layers.{layer}.{room}{part}.{kind}"


def plain_gpt(model: ModelConfig) -> PlainGPT:
    """With random values everywhere: biases are not zero, norms not one."""
    twin = PlainGPT(model)
    for seed, (name, parameter) in enumerate(twin.named_parameters()):
        values = random(*parameter.shape, seed=seed) * (0.3 if parameter.ndim == 2 else 0.2)
        parameter.data = values + 1 if name.endswith("norm.weight") else values
    return twin


def copy_weights(twin: PlainGPT, stage: nn.Module) -> None:
    """Give a stage its part of the twin's values. All parameters of the stage are written."""
    values = {our_name(name): parameter.data for name, parameter in twin.named_parameters()}
    for name, parameter in stage.named_parameters():
        fill(parameter, values[name])
