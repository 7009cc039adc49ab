"""From a range of documents to the files of a shard; what a worker process does, and the builder itself for little text.

    documents 4096 .. 8191   ->   train-00002.tokens, val-00002.tokens          ids, each document's followed by the end id
                                  train-00002.lengths, val-00002.lengths        int64 [documents]: of which the builder makes offsets

The ranges follow from the documents alone, not from the number of processes, so that any range can be written again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from tptrain.data.checksums import SummedFile, naming
from tptrain.data.documents import Documents
from tptrain.data.meta import SPLITS, Shard, dtype_of
from tptrain.data.splits import HeldOut, split_tail
from tptrain.data.tokenizers import Tokenizer

_MOST_BYTES, _LEAST_BYTES, _SHARDS = 64 << 20, 4 << 20, 16
"""Text of a shard: a 16th of all, but not above nor below these."""
_BATCH_BYTES = 1 << 20
"""Text that is in memory at a time, or one document."""
_DOCUMENT_BYTES = 64
"""What a document counts for beside its text, so that a million empty ones are not one batch."""
_ROWS_AT_ONCE = 100_000
"""Documents whose sizes are in memory at a time."""

Progress = Callable[[int, int], None]
"""progress(text_bytes, stored_bytes): called with what was done since the last call."""


@dataclass(frozen=True)
class Work:
    """What to tokenise and where to put it; sent to each worker."""

    documents: Documents
    tokenizer: Tokenizer
    held: HeldOut
    folder: Path


@dataclass(frozen=True)
class Range:
    """Documents first .. last - 1, which make the shards with this number."""

    number: int
    first: int
    last: int

    def text_bytes(self, documents: Documents) -> int:
        """The bytes of text in it."""
        return sum(int(sizes.sum()) for sizes in _sizes(documents, self.first, self.last))


@dataclass(frozen=True)
class Plan:
    """The ranges of a source."""

    ranges: list[Range]
    total_bytes: int
    """Text in all of them."""


def plan(documents: Documents) -> Plan:
    """Cut a source into ranges."""
    total_bytes = Range(0, 0, len(documents)).text_bytes(documents)
    most_bytes = min(_MOST_BYTES, max(_LEAST_BYTES, -(-total_bytes // _SHARDS)))
    cuts, row, before, previous = [0], 0, 0, 0
    for sizes in _sizes(documents, 0, len(documents)):
        parts, before = _parts(sizes, most_bytes, before)
        cuts += (row + np.flatnonzero(np.diff(parts, prepend=previous))).tolist()
        row, previous = row + len(sizes), int(parts[-1])
    ends = [*cuts[1:], len(documents)] if len(documents) else []
    return Plan([Range(number, first, last) for number, (first, last) in enumerate(zip(cuts, ends, strict=False))], total_bytes)


def write_range(work: Work, part: Range, progress: Progress) -> dict[str, Shard]:
    """Write the files of one range; the shards of the splits that have documents in it.

    Raises ConfigError for a document whose text cannot be used, OSError, which names the file, where one cannot be written.
    """
    held, lengths = work.held, {split: [np.empty(0, np.int64)] for split in SPLITS}
    with ExitStack() as stack:
        files: dict[str, SummedFile] = {}
        for first, last, text in _batches(work.documents, part):
            validation = held.mask(first, last)
            texts = work.documents.texts(first, last)
            if held.tail:
                texts, validation = list(split_tail(texts[0], held.tail)), np.array([False, True])
            stored_bytes = 0
            for split, ids in _split(work.tokenizer.encode_batch(texts), validation).items():
                if split not in files:
                    files[split] = stack.enter_context(SummedFile(work.folder / shard_name(split, part.number)))
                data = _join(ids, work.tokenizer)
                files[split].write(data)
                lengths[split].append(np.array([len(one) + 1 for one in ids], dtype=np.int64))
                stored_bytes += len(data)
            progress(text, stored_bytes)
        shards = {}
        for split, file in files.items():
            found = np.concatenate(lengths[split])
            path = lengths_path(file.path)
            with naming(path):
                path.write_bytes(found.astype("<i8").tobytes())
            shards[split] = Shard(file.finish(), int(found.sum()), len(found), part.first, part.last)
    return shards


def shard_name(split: str, number: int) -> str:
    """A shard's file.

    >>> shard_name("train", 7)
    'train-00007.tokens'
    """
    return f"{split}-{number:05d}.tokens"


def lengths_path(path: Path) -> Path:
    """Where the ids of each document of a shard are counted until the builder has made offsets of them."""
    return path.with_suffix(".lengths")


def _split(encoded: list[np.ndarray], validation: np.ndarray) -> dict[str, list[np.ndarray]]:
    parts: dict[str, list[np.ndarray]] = {}
    for ids, held in zip(encoded, validation.tolist(), strict=True):
        parts.setdefault("val" if held else "train", []).append(ids)
    return parts


def _join(encoded: list[np.ndarray], tokenizer: Tokenizer) -> bytes:
    """The ids of all documents, each with the end-of-document id after it, as they are stored. Raises ValueError for an alien id."""
    end = np.array([tokenizer.end_of_document], dtype=np.int64)
    ids = np.concatenate([piece for one in encoded for piece in (one, end)])
    if not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise ValueError(f"the tokenizer {tokenizer.name} gives ids {ids.min()}..{ids.max()}, not all in range({tokenizer.vocab_size})")
    return ids.astype(dtype_of(tokenizer.vocab_size)).tobytes()


# ---- sizes -----------------------------------------------------------------------------------------------


def _batches(documents: Documents, part: Range) -> Iterator[tuple[int, int, int]]:
    """First document, the one after the last, and bytes of text, of what is tokenised at a time."""
    first = part.first
    for sizes in _sizes(documents, part.first, part.last):
        cuts = [0, *(1 + np.flatnonzero(np.diff(_parts(sizes, _BATCH_BYTES, 0)[0]))).tolist(), len(sizes)]
        for start, end in pairwise(cuts):
            yield first + start, first + end, int(sizes[start:end].sum())
        first += len(sizes)


def _parts(sizes: np.ndarray, most_bytes: int, before: int) -> tuple[np.ndarray, int]:
    """Which part each document of these sizes is in, int64 [n], and what stands before the next document.

    before: what stands before the first. A part has at most most_bytes and the rest of one document.
    """
    ends = before + np.cumsum(sizes + _DOCUMENT_BYTES)
    return np.concatenate(([before], ends[:-1])) // most_bytes, int(ends[-1])


def _sizes(documents: Documents, first: int, last: int) -> Iterator[np.ndarray]:
    """The bytes of each text, some documents at a time."""
    for start in range(first, last, _ROWS_AT_ONCE):
        yield _text_bytes(documents, start, min(start + _ROWS_AT_ONCE, last))


def _text_bytes(documents: Documents, first: int, last: int) -> np.ndarray:
    """The bytes of each text, int64 [last - first], from arrow's own offsets; 0 where there is no text, for `texts` to refuse."""
    import pyarrow as pa
    from pyarrow import compute

    if documents.column not in documents.dataset.column_names:
        return np.zeros(last - first, dtype=np.int64)
    column = documents.dataset.select_columns(documents.column).with_format("arrow")[first:last].column(0)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return np.zeros(last - first, dtype=np.int64)
    return compute.fill_null(compute.binary_length(column), 0).to_numpy().astype(np.int64)
