"""Inference with one stage of a model: the prompts at once, then one token of each row at a time.

    tokens [b, t] ─ embedding ─ blocks, with the k and v of all earlier tokens ─ last token ─ norm ─ head ─ logits [b, vocab/tp]
    └───── first stage ──────┘└───────────── each stage, its layers ─────────┘└─────────────── last stage ─────────────────────┘

It computes with the weights, norms and activations of a `GPTStage`. Prompts of different length are padded on the left. A row's
positions begin behind its padding, and nothing but padding sees padding, so each row gets the logits that it would get alone:

    . . a b c     padding 2, positions 0 1 2
    d e f g h     padding 0, positions 0 1 2 3 4
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.model.attention import Attention
from tptrain.model.gpt import Block, GPTStage
from tptrain.model.rotary import Rotation, rotate, rotation
from tptrain.tensor_parallel.inference import ForwardOnly, KeyValueCache


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as one batch: tokens [b, longest] int64, and each row's padding [b] int64.

    >>> left_padded([[7], [8, 9]])
    (tensor([[0, 7],
            [8, 9]]), tensor([1, 0]))
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * missing + list(prompt) for missing, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(padding)


class Decoder:
    """A stage that reads on where it stopped, with the keys and values of its own layers. All ranks of the tp group call it alike.

    Weights are read when it is called: after an update of them, `drop_copies` the stage and make a new Decoder.
    """

    def __init__(self, stage: GPTStage, batch_size: int, max_tokens: int) -> None:
        """max_tokens: of a row, padding included. Raises ValueError for too many."""
        model = stage.model
        if max_tokens > model.max_seq_len:
            raise ValueError(f"{max_tokens} tokens are more than max_seq_len={model.max_seq_len}")
        block = next(iter(stage.layers.values()))
        assert isinstance(block, Block)
        self.stage, self.group = stage, stage.group
        self.device, self.dtype = block.mlp.down.values("weight").device, block.mlp.down.compute_dtype
        self.run = ForwardOnly()
        self.cache = KeyValueCache(
            len(stage.layers), batch_size, model.kv_heads, max_tokens, model.head_size, stage.group, self.dtype, self.device
        )  # fmt: skip
        self.padding: Tensor | None = None  # [b]; None where no row has any
        self.turns: Rotation | None = None
        if model.position == "rope":
            self.turns = rotation(torch.arange(max_tokens, device=self.device), model.head_size, model.rope_theta)

    @torch.no_grad()
    def __call__(self, x: Tensor, padding: Tensor | None = None, /) -> Tensor:
        """Read t tokens of each row behind all earlier ones.

        x: tokens [b, t] on the first stage, else the activations [b, t, h] of the stage before, which are overwritten.
        padding: [b], with the first call: the tokens at each row's left that are none.
        Returns activations [b, t, h], on the last stage this rank's logits of each row's last token, [b, vocab/tp]. The first and
        the last stage's result lies in a buffer that the next call overwrites.
        """
        if (x.dim() == 2) != self.stage.is_first:
            raise ValueError(f"the first stage reads tokens [b, t], the others activations [b, t, h]: got {list(x.shape)}")
        x = x.to(self.device)
        if padding is not None:
            if self.cache.length:
                raise ValueError("padding comes with the first tokens")
            self.padding = padding.to(self.device) if padding.any() else None
        b, t = x.shape[:2]
        positions = self._positions(t)
        mask = self._mask(t)
        x = self._embed(x, positions) if self.stage.is_first else x.flatten(0, 1)
        turn = self._turn(positions)
        for number, block in enumerate(self.stage.layers.values()):
            assert isinstance(block, Block)
            normed = block.attention_norm(x)
            x += self._attention(block.attention, number, normed.view(b, t, -1), turn, mask)
            inner = block.mlp.activation(*self.run.columns("mlp", block.mlp_norm(x), block.mlp.columns))
            x += self.run.row("mlp.down", inner, block.mlp.down)
        self.cache.advance(t)
        if not self.stage.is_last:
            return x.view(b, t, -1)
        last = self.stage.final_norm(x.view(b, t, -1)[:, -1])
        return self.run.logits("logits", last, self.stage.head or self.stage.embedding)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens: [b, t] -> [b * t, h]."""
        x = self.run.embedding("residual", tokens.flatten(), self.stage.embedding)
        if self.stage.model.position == "learned":
            x.view(*tokens.shape, -1).add_(self.stage.positions.values("weight")[positions])
        return x

    def _attention(self, layer: Attention, number: int, x: Tensor, turn: Rotation | None, mask: Tensor | None) -> Tensor:
        """x: [b, t, h] -> [b * t, h]."""
        b, t, _ = x.shape
        columns = self.run.columns("attention", x.flatten(0, 1), [layer.q, layer.k, layer.v])
        q, k, v = (layer.split_heads(y.view(b, t, -1)) for y in columns)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        k, v = self.cache.extend(number, k, v)
        causal = mask is None and t > 1  # torch's is_causal is for queries that begin where the keys begin
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.run.row("attention.out", y.transpose(1, 2).reshape(b * t, -1), layer.out)

    def _positions(self, count: int) -> Tensor:
        """Positions of the next `count` tokens: [1, t], or [b, t] where rows begin at different places."""
        columns = torch.arange(self.cache.length, self.cache.length + count, device=self.device).unsqueeze(0)
        return columns if self.padding is None else (columns - self.padding.unsqueeze(1)).clamp_(min=0)

    def _turn(self, positions: Tensor) -> Rotation | None:
        """What rotary positions turn q and k by, from the table: [b or 1, 1, t, d/2]."""
        if self.turns is None:
            return None
        return Rotation(*(table[positions].unsqueeze(1) for table in self.turns))

    def _mask(self, count: int) -> Tensor | None:
        """What the next `count` tokens see, bool [b or 1, 1, t, all tokens], or None where torch can do without.

        Padding sees itself alone: a row that sees nothing would have no softmax.
        """
        if self.padding is None and (count == 1 or self.cache.length == 0):
            return None
        seen = torch.arange(self.cache.length + count, device=self.device)
        seeing = seen[self.cache.length :, None]
        mask = (seen <= seeing)[None, None]
        if self.padding is None:
            return mask
        return mask & ((seen >= self.padding[:, None, None, None]) | (seen == seeing))
