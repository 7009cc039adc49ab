"""How a box of a tensor is cut into tiles, the pieces that a checkpoint stores, checksums and reads whole. Knows no torch.

    a [512, 1536] matrix, 2 x 4 tiles       0 | 1 | 2 | 3          Each tile lies in the file in one piece, row by row,
                                            --+---+---+--          and the tiles follow each other in this order.
                                            4 | 5 | 6 | 7

A dimension is cut wherever 2, 4, 8 ... ranks that share it would cut it: rank i of n begins at i * ceil(size / n). So a rank of any such
layout reads exactly its own part, along rows or along columns, whichever layout wrote the file. The cuts belong to the whole tensor: a
box that is but a part of it has those that go through it. For how many ranks a tensor is cut is written down with it (`parts`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

MOST_PARTS = 16
"""A dimension is cut for so many ranks at most."""
TILE_BYTES = 128 << 10
"""A tensor is cut no further than into tiles of so many bytes, on average."""
ROW_NUMBERS = 128
"""And no row of a tile has fewer numbers: short ones are slow to copy."""


class Tile(NamedTuple):
    """A tile: where it lies in its tensor, and where in the bytes of its box."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    at: int
    bytes: int


def parts(shape: Sequence[int], number_bytes: int) -> tuple[int, ...]:
    """For how many ranks each dimension of a tensor is cut: rows are halved, columns, rows again ... while the tiles stay large enough.

    number_bytes: the bytes of one number.

    >>> parts([50304, 768], 4), parts([768, 768], 4), parts([768], 4), parts([], 4)
    ((16, 4), (4, 4), (1,), ())
    """
    found = [1] * len(shape)
    tiles = math.prod(shape) * number_bytes // TILE_BYTES
    most = [min(MOST_PARTS, length // (ROW_NUMBERS if dim == len(shape) - 1 else 1)) for dim, length in enumerate(shape[:2])]
    for _ in range(MOST_PARTS.bit_length()):
        for dim, limit in enumerate(most):
            if tiles >= 2 and 2 * found[dim] <= limit:
                found[dim] *= 2
                tiles //= 2
    return tuple(found)


def edges(length: int, for_ranks: int, first: int, end: int) -> list[int]:
    """Where 1, 2, 4 ... `for_ranks` ranks would cut a dimension of `length`, between `first` and `end`, with these two.

    >>> edges(16, 4, 0, 16), edges(10, 4, 0, 10), edges(10, 4, 4, 9)
    ([0, 4, 8, 12, 16], [0, 3, 5, 6, 9, 10], [4, 5, 6, 9])
    """
    found = {first, end}
    while for_ranks > 1:
        found.update(edge for edge in range(0, length, -(-length // for_ranks)) if first < edge < end)
        for_ranks //= 2
    return sorted(found)


def grid(shape: Sequence[int], for_ranks: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> list[list[int]]:
    """The edges of a box's tiles in each dimension.

    shape, for_ranks: of the whole tensor, the latter as `parts` says. offset, size: the box's first corner and its lengths.
    """
    ends = [first + length for first, length in zip(offset, size, strict=True)]
    return [edges(*numbers) for numbers in zip(shape, for_ranks, offset, ends, strict=True)]


def tiles_of(box_grid: Sequence[Sequence[int]], number_bytes: int) -> list[Tile]:
    """The tiles of a box, of which no dimension is empty, in their order in the file.

    >>> [(tile.offset, tile.size, tile.at) for tile in tiles_of(grid([512, 256], [2, 2], [256, 0], [256, 256]), 4)]
    [((256, 0), (256, 128), 0), ((256, 128), (256, 128), 131072)]
    """
    spans = [list(itertools.pairwise(numbers)) for numbers in box_grid]
    found: list[Tile] = []
    at = 0
    for box in itertools.product(*spans):
        lengths = tuple([end - first for first, end in box])
        found.append(Tile(tuple([first for first, _ in box]), lengths, at, math.prod(lengths) * number_bytes))
        at += found[-1].bytes
    return found


def slices(first: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """What to index a box that begins at `first` with, to get the box at `offset` and as long as `size`; all in the whole tensor.

    >>> slices([8, 0], [10, 4], [2, 2])
    (slice(2, 4, None), slice(4, 6, None))
    """
    return tuple([slice(at - begin, at - begin + length) for at, begin, length in zip(offset, first, size, strict=True)])


def overlap(
    offset: Sequence[int], size: Sequence[int], other_offset: Sequence[int], other_size: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The box that two boxes share, or None: its first corner and its lengths.

    >>> overlap([0, 4], [8, 8], [2, 0], [2, 6]), overlap([0], [4], [4], [4])
    (((2, 4), (2, 2)), None)
    """
    first, lengths = [], []
    for begin, length, other, other_length in zip(offset, size, other_offset, other_size, strict=True):
        first.append(max(begin, other))
        lengths.append(min(begin + length, other + other_length) - first[-1])
        if lengths[-1] <= 0:
            return None
    return tuple(first), tuple(lengths)
