"""The next token from the logits, and the loop around it.

Tokens are chosen on the CPU by the last stage's first rank, from the whole vocabulary's logits, and one all-reduce tells them to all.
Each row draws one number a token from a generator of its own, named by (seed, row): neither the other rows of the batch nor the
layout change what it gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.model.decode import left_padded
from tptrain.model.gpt import GPTStage
from tptrain.tensor_parallel.collectives import gather_from_group


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float
    """What logits are divided by; 0: always the most probable token."""
    top_k: int | None = None
    """Choose among so many most probable tokens only."""
    top_p: float | None = None
    """Of these, choose among the fewest most probable ones whose probability together reaches this share."""
    seed: int = 0


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What each token is drawn with. logits: [b, vocab] -> fp64 [b, vocab]; a temperature above 0. Of equal tokens the first stay."""
    logits = logits.double()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # a tiny temperature must not make an infinity
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = -torch.inf
    chances = ordered.softmax(-1)
    if sampling.top_p is not None:
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= sampling.top_p, 0)
        chances /= chances.sum(-1, keepdim=True)
    return torch.zeros_like(chances).scatter_(-1, order, chances)


class Chooser:
    """Chooses each row's next token, from fp32 logits on the CPU."""

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        """rows: the numbers that name the rows' generators, whatever batch they are in."""
        self.sampling = sampling
        self.generators = [_generator(sampling.seed, row) for row in rows]

    def choose(self, logits: Tensor) -> Tensor:
        """logits: [b, vocab] -> tokens [b] int64."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        cumulative = probabilities(logits, self.sampling).cumsum(-1)
        drawn = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in self.generators])
        # The first token whose cumulative probability is above the number: never one of probability 0.
        return torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True).squeeze(-1)


def whole_logits(part: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """The whole vocabulary's logits, [b, vocab], from each rank's part [b, vocab/tp]. Forward: all-gather. Backward: none."""
    return gather_from_group(part, group, -1, vocab_size)


class Reader(Protocol):
    """What the loop needs of a model: a `Decoder` of a whole one, or one split over stages."""

    stage: GPTStage
    """This rank's part."""
    group: dist.ProcessGroup
    """All ranks that share the model."""
    device: torch.device

    def __call__(self, tokens: Tensor, padding: Tensor | None = None, /) -> Tensor | None:
        """Tokens [b, t] -> on the last stage this rank's logits of each row's last token, [b, vocab/tp]."""


def continuations(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    chooser: Chooser,
    end: int | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> Iterator[list[int]]:
    """The tokens that follow the prompts, a list of one token a row at a time; the same on all of the reader's ranks.

    reader: a new one. end: what ends a row; the numbers that its list entry has afterwards mean nothing, and the loop ends with the
    last row. wanted: asked on the reader's first rank before each token; False ends the loop.
    """
    stage, group = reader.stage, reader.group
    ended = [False] * len(prompts)
    logits = reader(*left_padded(prompts))
    for number in range(max_new_tokens):
        chosen = torch.zeros(len(prompts) + 1, dtype=torch.int64)  # and whether there is to be one
        if stage.is_last:
            assert logits is not None
            whole = whole_logits(logits, stage.model.vocab_size, stage.group)
            if stage.group.rank() == 0:
                chosen[:-1] = chooser.choose(whole.float().cpu())
        if group.rank() == 0:
            chosen[-1] = wanted()
        chosen = chosen.to(reader.device)
        if group.size() > 1:  # a sum: one rank gives the tokens, one whether to go on, the others zeros
            dist.all_reduce(chosen, group=group)
        *tokens, going_on = chosen.tolist()
        if not going_on:
            return
        yield tokens
        ended = [was or token == end for was, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        if number + 1 < max_new_tokens:
            logits = reader(chosen[:-1].unsqueeze(1))


def _generator(seed: int, row: int) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
