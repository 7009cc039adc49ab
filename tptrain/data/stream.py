"""Rows of a batch straight from a stream, with no token store, for what does not fit the disk.

The stream is dealt out to data.stream_lanes lanes (L), and the lanes take turns, data.stream_run samples (C) each:

    sample      0   1   2   3   4   5   6   7   8         L = 2, C = 2
    lane        0   0   1   1   0   0   1   1   0
    window      0   1   0   1   2   3   2   3   4         of its lane

So which text a sample holds follows from the source, the seed and the group `data` alone, not from batch size, micro-batch size or dp.
A dp rank reads a contiguous part of each batch, and keeps the lanes that it needs: with C = 1 all of them, as soon as its part has L
samples or more; with C = global batch size / L and L a multiple of dp its own L / dp ones alone.

Files are dealt out whole as far as their number divides evenly, and rows within (see `dealer`). An epoch ends for each lane by itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from tptrain.config_error import refuse
from tptrain.data.dealer import Dealer
from tptrain.data.lane import Lane, Mark
from tptrain.data.sources import Source
from tptrain.data.tokenizers import Tokenizer
from tptrain.data_config import DataConfig

_REMEMBERED_CALLS = 64
"""So many calls of `rows` the trainer may be behind the reader, with `state` still exact and near."""


class StreamRows:
    """Samples of seq_len + 1 tokens by their global number, from a stream.

    source: its first data.val_documents documents are left out. report: called with a line at a time on what makes reading slow.
    One thread at a time calls `rows`; meanwhile another may call `state`.
    """

    samples_per_epoch: None = None
    """A stream has no known end."""

    def __init__(self, source: Source, tokenizer: Tokenizer, data: DataConfig, seed: int, report: Callable[[str], None] = print) -> None:
        self._data, self._tokenizer, self._seed, self._report = data, tokenizer, seed, report
        self._source = source
        self._lanes: dict[int, Lane] = {}
        self._calls: deque[int] = deque(maxlen=_REMEMBERED_CALLS)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Samples first .. first + count - 1, int64 [count, seq_len + 1].

        Quick where calls follow each other, or a loaded state is near; else exact as well, but everything in between is read. Raises
        ValueError for negative numbers, ConfigError where the stream cannot be read.
        """
        if first < 0 or count < 0:
            raise ValueError(f"samples {first}..{first + count - 1} do not exist")
        lanes = np.arange(first, first + count) // self._data.stream_run % self._data.stream_lanes
        rows = np.empty((count, self._data.seq_len + 1), dtype=np.int64)
        touched = {int(number): self._lane(int(number)) for number in np.unique(lanes)}  # all known before the first reads
        for number, lane in touched.items():
            here = lanes == number
            rows[here] = lane.rows(self._windows_before(first, number), int(here.sum()))
        self._calls.append(first)
        for number, lane in touched.items():
            lane.forget(self._windows_before(min(self._calls), number) * self._data.seq_len)
        return rows

    def state(self, sample: int) -> dict[str, Any]:
        """What lets a reader go on at a sample without reading all before it, as JSON: for the lanes that this reader knows."""
        lanes = self._lanes.copy().items()
        marks = {number: lane.mark(self._windows_before(sample, number) * self._data.seq_len) for number, lane in lanes}
        return {"of": self._identity(), "lanes": {str(number): asdict(mark) for number, mark in marks.items() if mark.token}}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Make known what `state` of any readers of this stream said. Raises ConfigError where it is of a stream dealt out otherwise."""
        if not state:
            return
        for key, mine in self._identity().items():
            saved = state["of"].get(key, mine)
            if saved != mine and key == "parts":
                rule = f"names a stream in {mine} parts that divide its files and its lanes, and the checkpoint's had {saved}"
                raise refuse("data.source", self._data.source, rule, "use the same files, or another hydra.run.dir")
            if saved != mine:
                raise refuse(key, mine, f"differs from {saved} of the checkpoint's stream", f"use {key}={saved}, or another hydra.run.dir")
        for number, mark in state["lanes"].items():
            self._lane(int(number)).add(Mark(**mark))

    def _identity(self) -> dict[str, int]:
        """What the states of lanes mean something under."""
        keys = ("seq_len", "stream_lanes", "stream_run", "shuffle_buffer", "val_documents")
        return {"seed": self._seed, **{f"data.{key}": getattr(self._data, key) for key in keys}, "parts": len(self._dealers)}

    @cached_property
    def _dealers(self) -> list[Dealer]:
        """Opened when first asked for: most ranks of a job read nothing."""
        return _deal_files(self._source, self._data, self._report)

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            parts = len(self._dealers)
            dealer, place = self._dealers[number % parts], number // parts
            self._lanes[number] = Lane(dealer, number, place, self._tokenizer, self._data, self._seed, self._report)
        return self._lanes[number]

    def _windows_before(self, sample: int, lane: int) -> int:
        """How many samples before `sample` come from a lane."""
        run = self._data.stream_run
        turns, rest = divmod(sample, run * self._data.stream_lanes)
        return turns * run + min(max(rest - lane * run, 0), run)


def merge_states(states: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """One state of several readers: of each lane the one that is furthest on. None where nobody has one."""
    known = [state for state in states if state]
    if not known:
        return None
    lanes: dict[str, Any] = {}
    for number, mark in (item for state in known for item in state["lanes"].items()):
        if number not in lanes or mark["token"] > lanes[number]["token"]:
            lanes[number] = mark
    return {"of": known[0]["of"], "lanes": lanes}


def _deal_files(source: Source, data: DataConfig, report: Callable[[str], None]) -> list[Dealer]:
    """A dealer for each part of the files: as many parts as divide both the files and the lanes.

    With documents held out at the start there is one part, because `datasets` takes them from the start of each part.
    """
    from datasets.distributed import split_dataset_by_node

    stream = source.stream()
    held_out = data.val_documents
    parts = 1 if held_out else math.gcd(stream.num_shards, data.stream_lanes)
    dealers = []
    for part in range(parts):
        own = split_dataset_by_node(stream, part, parts, strategy="shards") if parts > 1 else stream.skip(held_out) if held_out else stream
        name = f"{source.label} (files {part + 1}, {part + 1 + parts}, ...)" if parts > 1 else source.label
        dealers.append(Dealer(own, source.column, data.stream_lanes // parts, data.shuffle_buffer, name, held_out, report))
    return dealers
