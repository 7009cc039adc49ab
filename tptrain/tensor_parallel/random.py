"""Random numbers that belong to the logical tensor, not to the rank that draws them: dropout that no layout changes.

A stream is named by the seed, the place in the model and the number of the training sample, and each row of a batch draws from a
stream of its own. So nothing has to be saved with a checkpoint but how many samples were read; recomputation in backward draws
the same numbers again, in whatever order a schedule runs; and the same holds under every layout:

    replicated     activations that are equal on all tp ranks: all draw the same mask
    sequence       a rank's part [b, s/tp, h] of such an activation: its slice of that same mask
    sharded        what only one rank holds (its attention heads): a stream for each head of the whole model
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.tensor_parallel.communication import split


@dataclass(frozen=True)
class Stream:
    """A named place of random numbers for the rows of one micro-batch."""

    seed: int
    first_sample: int
    """Number of the micro-batch's first sample since the start of training; its rows follow."""
    name: str = ""

    def at(self, name: str) -> Stream:
        """The stream of a place inside this one."""
        return Stream(self.seed, self.first_sample, f"{self.name}/{name}")

    def generator(self, row: int, device: torch.device) -> torch.Generator:
        """A new generator at the start of this stream, for a row of the micro-batch."""
        key = f"{self.seed}/{self.first_sample + row}{self.name}".encode()
        return torch.Generator(device).manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)


def keep_mask(stream: Stream, shape: torch.Size, probability: float, device: torch.device) -> Tensor:
    """What dropout multiplies with: 1/(1-p) where an element stays, 0 where it goes; fp32 of `shape` = [b, ...]."""
    mask = torch.empty(shape, device=device)
    for row in range(shape[0]):
        mask[row].bernoulli_(1 - probability, generator=stream.generator(row, device))
    return mask.div_(1 - probability)


def dropout(x: Tensor, probability: float, stream: Stream | None, sequence_group: dist.ProcessGroup | None = None) -> Tensor:
    """Dropout of a replicated activation [b, s, h], or with `sequence_group` of this rank's part [b, s/tp, h] of one.

    stream: None outside of training: x as it is.
    """
    if stream is None or probability == 0:
        return x
    if sequence_group is None:
        return (x * keep_mask(stream, x.shape, probability, x.device)).to(x.dtype)
    whole = torch.Size((x.shape[0], x.shape[1] * sequence_group.size(), *x.shape[2:]))
    return (x * split(keep_mask(stream, whole, probability, x.device), 1, sequence_group)).to(x.dtype)


def dropout_heads(x: Tensor, probability: float, stream: Stream | None, first_head: int) -> Tensor:
    """Dropout of what belongs to attention heads, [b, heads/tp, s, s]; `first_head` is the number of this rank's first one."""
    if stream is None or probability == 0:
        return x
    b, heads, *inner = x.shape
    masks = [keep_mask(stream.at(f"head {first_head + i}"), torch.Size((b, *inner)), probability, x.device) for i in range(heads)]
    return (x * torch.stack(masks, dim=1)).to(x.dtype)
