"""Tiles cover a box once, and no rank of a layout in powers of two shares a tile with another."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.checkpoint.tiles import MOST_PARTS, ROW_NUMBERS, TILE_BYTES, grid, parts, tiles_of
from tptrain.tensor_parallel.communication import shard_bounds

POWERS = [1, 2, 4, 8, 16]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int]]:
    """A tensor's shape, its parts, and a box of it: first corner and lengths."""
    shape = draw(st.lists(st.integers(1, 70), min_size=0, max_size=3))
    for_ranks = [draw(st.sampled_from(POWERS)) for _ in shape]
    offset = [draw(st.integers(0, length - 1)) for length in shape]
    size = [draw(st.integers(1, length - first)) for length, first in zip(shape, offset, strict=True)]
    return shape, for_ranks, offset, size


@settings(deadline=None, max_examples=150)
@given(boxes())
def test_tiles_are_slices_of_the_box_one_after_the_other(box: tuple[list[int], ...]) -> None:
    shape, for_ranks, offset, size = box
    whole = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    part = whole[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))]
    file = b""
    again = np.full(shape, -1, dtype=np.int32)
    for tile in tiles_of(grid(shape, for_ranks, offset, size), 4):
        place = tuple(slice(first, first + length) for first, length in zip(tile.offset, tile.size, strict=True))
        assert (tile.at, tile.bytes) == (len(file), whole[place].nbytes)
        assert np.all(again[place] == -1), "no number is in two tiles"
        again[place] = whole[place]
        file += whole[place].tobytes()
    assert len(file) == part.nbytes
    assert np.array_equal(again[again >= 0], part.reshape(-1))


@settings(deadline=None, max_examples=100)
@given(boxes(), st.data())
def test_a_tile_belongs_to_one_rank(box: tuple[list[int], ...], data: st.DataObject) -> None:
    shape, for_ranks, offset, size = box
    layout = [data.draw(st.sampled_from([ranks for ranks in POWERS if ranks <= most])) for most in for_ranks]
    for tile in tiles_of(grid(shape, for_ranks, offset, size), 4):
        holders = 0
        for place in itertools.product(*map(range, layout)):
            bounds = [shard_bounds(*numbers) for numbers in zip(shape, layout, place, strict=True)]
            zipped = zip(tile.offset, tile.size, bounds, strict=True)
            holders += all(first < end and begin < first + length for first, length, (begin, end) in zipped)
        assert holders == 1


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 3000), min_size=0, max_size=3), st.sampled_from([1, 2, 4, 8]))
def test_tiles_are_large_few_and_as_square_as_can_be(shape: list[int], number_bytes: int) -> None:
    found = parts(shape, number_bytes)
    assert len(found) == len(shape)
    assert all(count in POWERS for count in found)
    assert all(count == 1 for count in found[2:])
    total = math.prod(shape) * number_bytes
    assert math.prod(found) == 1 or total // math.prod(found) >= TILE_BYTES
    room = [min(MOST_PARTS, length // ROW_NUMBERS if dim == len(shape) - 1 else length) for dim, length in enumerate(shape[:2])]
    assert all(count <= max(1, most) for count, most in zip(found, room, strict=False))
    finer = [dim for dim, most in enumerate(room) if 2 * found[dim] <= most]
    assert not finer or total // math.prod(found) < 2 * TILE_BYTES, "cut as far as the rule lets"
    if len(finer) == 2:
        assert found[0] in (found[1], 2 * found[1])
