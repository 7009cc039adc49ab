"""Both families of GPT written with torch.nn alone, attention as a plain softmax: the twin that the split one is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tensor_parallel.support import fill, random
from tptrain.config import ModelConfig

Drop = Callable[[str, Tensor], Tensor]
"""What dropout does to a tensor at a named place of the model."""


def keep_all(place: str, x: Tensor) -> Tensor:
    return x


class PlainRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def plain_norm(model: ModelConfig) -> nn.Module:
    if model.norm == "rmsnorm":
        return PlainRMSNorm(model.hidden_size, model.norm_eps)
    return nn.LayerNorm(model.hidden_size, model.norm_eps, bias=model.bias)


def turn(x: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers: elements i and i + d/2 of position p times e^(i p theta^(-2i/d)). x: [b, heads, s, d]."""
    s, half = x.shape[2], x.shape[3] // 2
    angles = torch.arange(s).unsqueeze(1) * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(s, half), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


class PlainBlock(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model, hidden, inner = model, model.hidden_size, model.ffn_hidden_size
        kv_size = model.kv_heads * hidden // model.num_heads
        self.attention_norm, self.mlp_norm = plain_norm(model), plain_norm(model)
        self.q, self.out = (nn.Linear(hidden, hidden, model.bias) for _ in range(2))
        self.k, self.v = (nn.Linear(hidden, kv_size, model.bias) for _ in range(2))
        if model.activation == "swiglu":
            self.gate = nn.Linear(hidden, inner, model.bias)
        self.up = nn.Linear(hidden, inner, model.bias)
        self.down = nn.Linear(inner, hidden, model.bias)

    def forward(self, x: Tensor, name: str, drop: Drop) -> Tensor:
        x = x + drop(f"{name}/attention", self.attend(self.attention_norm(x), f"{name}/attention", drop))
        return x + drop(f"{name}/mlp", self.mlp(self.mlp_norm(x)))

    def attend(self, x: Tensor, name: str, drop: Drop) -> Tensor:
        """One query head after the other; query heads i*r to (i+1)*r - 1 read key/value head i."""
        b, s, h = x.shape
        heads, kv_heads = self.model.num_heads, self.model.kv_heads
        d = h // heads
        q, k, v = (layer(x).view(b, s, -1, d).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.model.position == "rope":
            q, k = turn(q, self.model.rope_theta), turn(k, self.model.rope_theta)
        past = torch.ones(s, s, dtype=torch.bool).tril()
        outputs = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, shared].transpose(1, 2) / math.sqrt(d)
            weights = scores.where(past, -math.inf).softmax(-1)
            outputs.append(drop(f"{name}/head {head}", weights) @ v[:, shared])
        return self.out(torch.cat(outputs, dim=-1))

    def mlp(self, x: Tensor) -> Tensor:
        if self.model.activation == "swiglu":
            gate = self.gate(x)
            return self.down(gate * torch.sigmoid(gate) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.positions = nn.Embedding(model.max_seq_len, model.hidden_size) if model.position == "learned" else None
        self.blocks = nn.ModuleList(PlainBlock(model) for _ in range(model.num_layers))
        self.final_norm = plain_norm(model)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, drop: Drop = keep_all) -> Tensor:
        """tokens: [b, s] -> logits [b, s, vocab]."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        x = drop("embedding", x)
        for i, block in enumerate(self.blocks):
            x = block(x, f"layers.{i}", drop)
        return self.head(self.final_norm(x))


def our_name(name: str) -> str:
    """What a parameter of PlainGPT is called in GPTStage."""
    if not name.startswith("blocks."):
        return name
    _, layer, part, kind = name.split(".")
    room = "mlp." if part in ("gate", "up", "down") else "" if part.endswith("norm") else "attention."
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
