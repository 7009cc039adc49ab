"""Token stores: how fast one is written, opened and read in mixed order.

python -m benchmarks.tokenising [--megabytes 100] [--rounds 3] [--processes 2]

Writing: ours (two processes, checksums and fsync included) against `datasets.map(batched=True, num_proc=2)` with the same
byte-level BPE of 8192 ids, which is learned on the spot from python_docs; the text is python_docs over and over, with some words
of each copy changed. They take turns; both begin with the same memory-mapped documents, and must end with the same ids.

Opening: a store of 10^9 tokens (sparse files), in a process that has imported tptrain.data: the time, and what its memory grows by.
Order: one lookup in the permutation of 10^9 samples, alone and in a batch of 1024.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.alternate import ratio, turns
from benchmarks.bpe import END_TOKEN, learn
from tptrain.data import TokenStore
from tptrain.data.build import build_store
from tptrain.data.checksums import BLOCK_BYTES, FileNote, sums_path
from tptrain.data.documents import Documents, write_documents
from tptrain.data.hf_tokenizer import HFTokenizer
from tptrain.data.meta import Meta, Shard, SplitMeta, write_meta
from tptrain.data.sampler import permute
from tptrain.data.sources import open_source
from tptrain.data_config import DataConfig


@dataclass(frozen=True)
class Ready:
    """A source whose documents are there already, as both ways begin with them."""

    documents: Documents
    label: str = "copies"
    column: str = "text"

    def fingerprint(self) -> str:
        """There is one."""
        return "copies"

    def load(self, cache_dir: Path) -> Documents:
        """At once."""
        return self.documents


def copies(texts: list[str], total_bytes: int) -> Iterator[str]:
    """The texts again and again, one word in twenty with a number behind it."""
    generator, done = random.Random(0), 0
    while True:
        for text in texts:
            if done >= total_bytes:
                return
            changed = re.sub(r"\w+", lambda word: word[0] + str(generator.randrange(999)) if generator.random() < 0.05 else word[0], text)
            done += len(changed.encode())
            yield changed


def compare_writing(folder: Path, megabytes: int, rounds: int, processes: int) -> None:
    """Print the ratio of `datasets.map`'s time to ours."""
    data = DataConfig("python_docs", seq_len=1024, store_dir=str(folder / "stores"), num_proc=processes)
    python_docs = open_source(data).load(folder / "python_docs")
    texts = python_docs.texts(0, len(python_docs))
    core = learn(texts)
    tokenizer = HFTokenizer("bpe", core, END_TOKEN)
    dataset = write_documents(copies(texts, megabytes * 10**6), "text", folder / "copies.arrow")
    documents = Documents(dataset, "text", None, str, ("text",))
    sizes = [
        len(text.encode()) for first in range(0, len(documents), 500) for text in documents.texts(first, min(first + 500, len(documents)))
    ]
    print(f"{sum(sizes) / 1e6:.0f} MB of text in {len(sizes)} documents, {processes} processes")

    def ours() -> None:
        shutil.rmtree(folder / "stores", ignore_errors=True)
        build_store(data, Ready(documents), tokenizer, data, 0.0, lambda line: None)  # type: ignore[arg-type]

    def theirs() -> Any:
        shutil.rmtree(folder / "map", ignore_errors=True)
        (folder / "map").mkdir()

        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"ids": [one.ids for one in core.encode_batch_fast(rows["text"], add_special_tokens=False)]}

        return dataset.map(
            encode, batched=True, num_proc=processes, remove_columns=["text"], cache_file_name=str(folder / "map" / "ids.arrow"),
            new_fingerprint="ids", load_from_cache_file=False,
        )  # fmt: skip

    ours()
    (store,) = (folder / "stores").iterdir()
    ids = TokenStore.open(store).train.tokens[:]
    expected = np.concatenate([piece for row in theirs().with_format("numpy")["ids"] for piece in (row, [tokenizer.end_of_document])])
    assert np.array_equal(ids, expected), "both write the same ids"
    seconds = turns({"ours": ours, "theirs": theirs}, rounds, warmup=0)
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:8s} {middle:6.1f} s  {sum(sizes) / 1e6 / middle:5.1f} MB/s  {len(ids) / 1e6 / middle:5.2f} M tokens/s")
    print(f"tokenising: {ratio(seconds['theirs'], seconds['ours']):.2f} x the speed of datasets.map")


OPENING = """
import resource, sys, time
import numpy as np
from tptrain.data import TokenStore
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, start = resident(), time.perf_counter()
store = TokenStore.open(sys.argv[1])
opened = time.perf_counter() - start
assert len(store.train.tokens) == 10**9
row = store.train.tokens[987_654_321 : 987_654_321 + 2049]
first = time.perf_counter() - start
grown = resident() - before
generator = np.random.default_rng(0)
places = generator.integers(0, 10**9 - 2049, 2000).tolist()
start = time.perf_counter()
for place in places:
    row = store.train.tokens[place : place + 2049]
each = (time.perf_counter() - start) / len(places)
print(opened * 1e3, first * 1e3, grown / 1e6, each * 1e6)
"""


def sparse_store(folder: Path, tokens: int, shards: int) -> None:
    """A store of zeros that takes no room."""
    folder.mkdir()

    def note(name: str, size: int) -> FileNote:
        with open(folder / name, "wb") as file:
            file.truncate(size)
        whole, rest = divmod(size, BLOCK_BYTES)
        sums = np.array([zlib.crc32(bytes(BLOCK_BYTES))] * whole + [zlib.crc32(bytes(rest))] * bool(rest), dtype="<u4").tobytes()
        sums_path(folder / name).write_bytes(sums)
        return FileNote(name, size, os.stat(folder / name).st_mtime_ns, zlib.crc32(sums))

    each = tokens // shards
    train = tuple(Shard(note(f"train-{number:05d}.tokens", 2 * each), each, 1000, number, number + 1) for number in range(shards))
    splits = {"train": SplitMeta(note("train.offsets", 8 * (1000 * shards + 1)), train), "val": SplitMeta(note("val.offsets", 8), ())}
    write_meta(folder, Meta("0" * 64, "text", "byte", 257, 256, splits))


def measure_opening(folder: Path, rounds: int) -> None:
    """Print medians of fresh processes."""
    sparse_store(folder / "sparse", 10**9, 50)
    runs = [
        subprocess.run([sys.executable, "-c", OPENING, str(folder / "sparse")], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(rounds)
    ]
    opened, first, grown, each = (statistics.median(float(run[place]) for run in runs) for place in range(4))
    print(f"opening 10^9 tokens: {opened:.2f} ms; {first:.2f} ms with the first row read; memory grows by {grown:.1f} MB")
    print(f"rows of 2049 tokens at random, each block compared when first read: {each:.0f} us each")


def measure_order(rounds: int) -> None:
    """Print the time of a lookup."""
    alone, batch = [], []
    places = np.random.default_rng(0).integers(0, 10**9, 1024)
    for _ in range(rounds):
        for values, into in (([int(place) for place in places], alone), ([places], batch)):
            began = time.perf_counter()
            for value in values:
                permute(value, 10**9, 12345)
            into.append((time.perf_counter() - began) / 1024 * 1e6)
    print(f"permutation of 10^9 samples: {statistics.median(alone):.1f} us a lookup, {statistics.median(batch):.2f} us in a batch of 1024")


def main() -> None:
    """All three."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--megabytes", type=int, default=100)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--processes", type=int, default=2)
    options = arguments.parse_args()
    import datasets

    datasets.disable_progress_bars()
    with TemporaryDirectory() as folder:
        measure_opening(Path(folder), options.rounds)
        measure_order(options.rounds)
        compare_writing(Path(folder), options.megabytes, options.rounds, options.processes)


if __name__ == "__main__":
    main()
