"""Documents that share a row, kept apart: attention and positions begin anew at each, and no loss is taken across.

    inputs      a b E c d E E e        E: the end id, which belongs to the document that it ends
    targets     b E . d E . . f        none where the next token is of another document
    numbers     0 0 0 1 1 1 2 3
    positions   0 1 2 0 1 2 0 0

What a row holds of a document that began in an earlier row is a document of its own.

Attention gets the documents in one of two forms. A mask [b, 1, s, s] serves every device and dtype; it takes the work of the whole
square. Where torch has variable-length attention for the device (CUDA in bf16 and fp16), the rows of a micro-batch are one
sequence of runs instead, and each run costs as much as its document alone.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.tensor_parallel.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class Runs:
    """Documents as runs of the rows laid end to end."""

    starts: Tensor
    """int32 [documents + 1]: where each begins, and at last b * s."""
    longest: int
    """Tokens of the longest."""


Apart = Tensor | Runs
"""What keeps documents apart in attention: added to the scores [b, 1, s, s], 0 or -inf; or runs."""


@dataclass(frozen=True)
class RowDocuments:
    """The documents in the rows of a micro-batch."""

    numbers: Tensor
    """int64 [b, s]: which document of its row a token is of, counted from 0."""
    positions: Tensor
    """int64 [b, s]: where in its document a token stands, counted from 0."""
    runs: Runs | None
    """On CUDA, where the number of documents has to be asked of the device: once, before the first forward."""

    @classmethod
    def of(cls, inputs: Tensor, end_of_document: int) -> RowDocuments:
        """inputs: ids [b, s]. end_of_document: the id that each document ends with."""
        begins = torch.ones_like(inputs, dtype=torch.bool)
        begins[:, 1:] = inputs[:, :-1] == end_of_document
        columns = torch.arange(inputs.shape[1], device=inputs.device)
        starts = torch.where(begins, columns, 0).cummax(dim=1).values
        return cls(begins.cumsum(dim=1) - 1, columns - starts, runs_of(begins) if inputs.is_cuda else None)

    def apart(self, dtype: torch.dtype, head_size: int, as_mask: bool = False) -> Apart:
        """What attention computes with, in `dtype` and with heads of `head_size`. as_mask: whether the scores exist as a matrix."""
        if self.runs is not None and not as_mask and has_variable_length(self.numbers.device, dtype, head_size):
            return self.runs
        together = self.numbers.unsqueeze(2) == self.numbers.unsqueeze(1)
        mask = torch.zeros(together.shape, dtype=dtype, device=together.device)
        return mask.masked_fill_(~together.tril_(), -torch.inf).unsqueeze(1)


def targets_within(inputs: Tensor, targets: Tensor, end_of_document: int) -> Tensor:
    """The targets [b, s] without those that belong to another document than their input: IGNORE_INDEX behind each end id."""
    return targets.masked_fill(inputs == end_of_document, IGNORE_INDEX)


def runs_of(begins: Tensor) -> Runs:
    """begins: bool [b, s], where documents begin, each row's first token among them. Waits for the device."""
    starts = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=begins.numel())
    return Runs(starts.to(torch.int32), int(starts.diff().max()))


# ---- attention ---------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, apart: Apart | None) -> Tensor:
    """Causal attention within documents, or without them (None) within rows. q: [b, heads, s, d]; k, v: the same, or with fewer heads."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(apart, Runs):
        return attend_in_runs(q, k, v, apart)
    return F.scaled_dot_product_attention(q, k, v, apart, is_causal=apart is None, enable_gqa=grouped)


def attend_in_runs(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
    """The same by torch's variable-length attention, which reads [b * s, heads, d]."""
    rows, grouped = q.shape[0], q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    causal = (-1, 0)  # all that is to the left, nothing to the right
    y: Tensor = variable_length()(
        q, k, v, runs.starts, runs.starts, runs.longest, runs.longest, window_size=causal, enable_gqa=grouped
    )  # fmt: skip
    return y.unflatten(0, (rows, -1)).transpose(1, 2)


def has_variable_length(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's variable-length attention, FlashAttention's kernel, runs there: bf16 or fp16, heads of up to 256 by eights, and
    a GPU of the Ampere generation or later."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = head_size % 8 == 0 and head_size <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0) and variable_length() is not None


@functools.cache
def variable_length() -> Any:
    """torch's `varlen_attn`, or None where this torch has none or an earlier form of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None
