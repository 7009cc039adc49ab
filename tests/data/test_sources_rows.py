"""What the files hold is what `load` and `stream` give: every document, once, in order, to the character."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.distributed import split_dataset_by_node

from tptrain.config_error import ConfigError
from tptrain.data.documents import _batches
from tptrain.data.sources import Source, open_source
from tptrain.data_config import SourceConfig

TEXTS = [
    "The quick brown fox.\n",
    "Une œuvre naïve, un été.",
    "中文文本\u3000末尾",
    "👩‍👩‍👧 😀 \N{COMBINING ACUTE ACCENT}",
    "",
    "line\r\nends\rof\nall kinds\r\n",
    "\ufeffa mark, and one \ufeff inside",
    "  blanks \t and a final newline\n\n",
    "2020-01-01",
    "5",
    "null",
    '{"text": "json in json"}',
    "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\x00h",
    "0123456789é\n" * 400_000,
    "the last",
]
assert len(TEXTS[-2].encode()) > 5_000_000
OTHERS = [1, "two", None, [3], {"four": 4}, 5.5, True]
"""Values of another column, of which no two agree on a type."""


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def lines(end: bytes = b"\n", **options: Any) -> list[bytes]:
    rows = ({"id": OTHERS[i % len(OTHERS)], "text": text, f"only_{i}": i} for i, text in enumerate(TEXTS))
    return [json.dumps(row, **options).encode() + end for row in rows]


PLAIN, RAW, CRLF = b"".join(lines()), b"".join(lines(ensure_ascii=False)), b"".join(lines(b"\r\n", ensure_ascii=False))
JSONL: dict[str, bytes] = {
    "escaped.jsonl": PLAIN,
    "raw.jsonl": RAW,
    "crlf.jsonl": CRLF,
    "mark.jsonl": b"\xef\xbb\xbf" + RAW,
    "mark_crlf.jsonl": b"\xef\xbb\xbf" + CRLF,
    "no_final_newline.jsonl": RAW.removesuffix(b"\n"),
    "blank_lines.jsonl": b"\n  \n" + b"\n\r\n".join(lines(ensure_ascii=False)),
    "array.json": b"[" + b",\n".join(lines(b"")) + b"]",
    "marked_array.json": b"\xef\xbb\xbf [" + b",\n".join(lines(b"")) + b"]\n",
    "packed.jsonl.gz": gzip.compress(RAW, 1),
    "packed_marked.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + CRLF, 1),
    "two_members.jsonl.gz": gzip.compress(RAW[:5000], 1) + gzip.compress(RAW[5000:], 1),
    "packed.jsonl.zst": zstd(RAW),
    "two_frames.json.zst": zstd(RAW[:5000]) + zstd(RAW[5000:]),
    "packed.jsonl.bz2": bz2.compress(RAW, 1),
    "packed.jsonl.xz": lzma.compress(RAW, preset=0),
    "packed_without_saying_so.jsonl": gzip.compress(RAW, 1),
}


def loaded(source: Source, cache: Path) -> list[str]:
    documents = pickle.loads(pickle.dumps(source.load(cache)))  # as a worker process gets it
    assert documents.names is None
    assert documents.dataset.cache_files, "memory-mapped"
    return documents.texts(0, len(documents))


def streamed(source: Source) -> list[str]:
    stream = source.stream()
    assert isinstance(stream, datasets.IterableDataset)
    return [row[source.column] for row in stream]


@pytest.mark.parametrize("name", JSONL)
def test_jsonl(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(JSONL[name])
    source = open_source(SourceConfig("jsonl", path=str(tmp_path / name)))
    assert loaded(source, tmp_path / "cache") == TEXTS
    assert streamed(source) == TEXTS


@pytest.fixture(params=["jsonl", "parquet"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., SourceConfig]:
    """write(name, texts, column): a file in tmp_path/rows; and how to read the folder."""

    def write(name: str, texts: list[str], column: str = "text") -> SourceConfig:
        path = tmp_path / "rows" / f"{name}.{request.param}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "jsonl":
            path.write_text("".join(json.dumps({"id": [name], column: text}) + "\n" for text in texts))
        else:
            pq.write_table(pa.table({f"id_{len(name)}": range(len(texts)), column: pa.array(texts, pa.string())}), path, row_group_size=2)
        return SourceConfig(request.param, path=str(path.parent), text_column=column)

    return write


def test_files_come_in_the_order_of_their_names(tmp_path: Path, write: Callable[..., SourceConfig]) -> None:
    for first in (10, 0, 5):
        part = write(f"{first:02}[x]{{y}}", TEXTS[first : first + 5])
    write("05x", ["what the brackets of the others would match"])
    source = open_source(part)
    expected = [*TEXTS[:10], "what the brackets of the others would match", *TEXTS[10:]]  # "[" sorts before "x"
    assert loaded(source, tmp_path / "cache") == expected
    assert streamed(source) == expected


def test_a_list_comes_in_its_own_order_and_each_file_once(tmp_path: Path, write: Callable[..., SourceConfig]) -> None:
    kind = ""
    for name in ("a", "b", "c", "sub/d"):
        kind = write(name, [f"{name}1", f"{name}2"]).source
    folder = tmp_path / "rows"
    asked = [f"{folder}/c.{kind}", f"{folder}/sub", f"{folder}/*.{kind}"]
    source = open_source(SourceConfig(kind, path=asked))
    expected = ["c1", "c2", "sub/d1", "sub/d2", "a1", "a2", "b1", "b2"]
    assert loaded(source, tmp_path / "cache") == expected
    assert streamed(source) == expected


def test_a_file_of_only_dates_or_digits_is_text(tmp_path: Path, write: Callable[..., SourceConfig]) -> None:
    write("a", ["words"])
    write("b", ["2020-01-01", "2021-02-03T04:05:06"])
    source = open_source(write("c", ["5", "6.50", "true"]))
    assert loaded(source, tmp_path / "cache") == ["words", "2020-01-01", "2021-02-03T04:05:06", "5", "6.50", "true"]


def test_another_column(tmp_path: Path, write: Callable[..., SourceConfig]) -> None:
    source = open_source(write("a", TEXTS[:5], column="body"))
    assert source.column == "body"
    assert loaded(source, tmp_path / "cache") == TEXTS[:5]
    assert streamed(source) == TEXTS[:5]


def test_any_range_and_where(tmp_path: Path, write: Callable[..., SourceConfig]) -> None:
    texts = [f"{number} " * (number % 7) for number in range(2500)]  # more than are written at once
    write("a", texts[:1200])
    documents = open_source(write("b", texts[1200:])).load(tmp_path / "cache")
    assert len(documents) == 2500
    for first, last in ((0, 0), (0, 1), (7, 9), (900, 1300), (2499, 2500), (0, 2500)):
        assert documents.texts(first, last) == texts[first:last]
    kind = documents.where(0).split(", ")[0].rsplit(".", 1)[1]
    assert documents.where(0) == f"{tmp_path}/rows/a.{kind}, row 1"
    assert documents.where(1199) == f"{tmp_path}/rows/a.{kind}, row 1200"
    assert documents.where(1200) == f"{tmp_path}/rows/b.{kind}, row 1"


def test_few_rows_and_little_text_are_held_at_once() -> None:
    assert [len(batch) for batch in _batches(["x"] * 2500)] == [1000, 1000, 500]
    assert [len(batch) for batch in _batches(["x" * (1 << 23)] * 5)] == [2, 2, 1]
    assert list(_batches([])) == []


def test_where_counts_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    documents = open_source(SourceConfig("jsonl", path=str(tmp_path / "a.jsonl"))).load(tmp_path / "cache")
    assert [documents.where(index) for index in (0, 1)] == [f"{tmp_path}/a.jsonl, row 1", f"{tmp_path}/a.jsonl, row 4"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_of_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind), "id": OTHERS[:1] * len(TEXTS)}), tmp_path / "a.parquet")
    source = open_source(SourceConfig("parquet", path=str(tmp_path / "a.parquet")))
    assert loaded(source, tmp_path / "cache") == TEXTS
    assert streamed(source) == TEXTS


def test_saved(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"body": TEXTS, "id": list(range(len(TEXTS)))})
    data.with_format("numpy").save_to_disk(tmp_path / "one", num_shards=3)
    mixed = data.select(range(len(TEXTS) - 1, -1, -1))
    datasets.DatasetDict({"train": mixed, "test": data.select([1, 3])}).save_to_disk(tmp_path / "splits")
    for folder, split, expected in (("one", None, TEXTS), ("splits", None, TEXTS[::-1]), ("splits", "test", [TEXTS[1], TEXTS[3]])):
        source = open_source(SourceConfig("saved", path=str(tmp_path / folder), text_column="body"), split=split)
        assert loaded(source, tmp_path / "cache") == expected
        assert streamed(source) == expected
    assert not (tmp_path / "cache").exists(), "nothing is copied"
    by_key = open_source(SourceConfig("saved", path=str(tmp_path / "splits"), text_column="body", split="test"))
    assert by_key.load(tmp_path).where(1) == f"{tmp_path}/splits/test, row 2"


def test_text_streams_what_it_loads(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    source = open_source(SourceConfig("text", path=[f"{tmp_path}/*.txt"]))
    documents = source.load(tmp_path / "cache")
    assert documents.names == tuple(f"{number:02}.txt" for number in range(len(TEXTS)))
    assert documents.texts(0, len(TEXTS)) == TEXTS
    assert streamed(source) == TEXTS
    docs = open_source(SourceConfig("python_docs"))
    documents = docs.load(tmp_path / "cache")
    assert streamed(docs) == documents.texts(0, len(documents))


def test_names_of_a_list_of_text_files_tell_them_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    documents = open_source(SourceConfig("text", path=[f"{tmp_path}/two", f"{tmp_path}/one/*"])).load(tmp_path / "cache")
    assert documents.names == ("two/a.txt", "one/a.txt")
    assert documents.texts(0, 2) == ["two", "one"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_stream_is_shared_out_and_goes_on_from_its_state(tmp_path: Path, kind: str) -> None:
    texts = [f"document {number}" for number in range(97)]
    cuts = [0, 30, 31, 70, 97]
    for start, end in pairwise(cuts):
        if kind == "jsonl":
            packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts[start:end]).encode())
            (tmp_path / f"{start:02}.jsonl.gz").write_bytes(packed)
        elif kind == "parquet":
            pq.write_table(pa.table({"text": texts[start:end]}), tmp_path / f"{start:02}.parquet", row_group_size=7)
    if kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path, num_shards=4)
    source = open_source(SourceConfig(kind, path=str(tmp_path)))
    for readers in (2, 3, 4):  # 2 and 4 deal out whole files, 3 every third row
        parts = [split_dataset_by_node(source.stream(), rank=rank, world_size=readers) for rank in range(readers)]
        assert sorted(row["text"] for part in parts for row in part) == sorted(texts)
    for stop in (1, 30, 45, 96):
        stream, rows = source.stream(), []
        for row in stream:
            rows.append(row["text"])
            if len(rows) == stop:
                break
        state = json.loads(json.dumps(stream.state_dict()))
        stream = source.stream()
        stream.load_state_dict(state)
        assert rows + [row["text"] for row in stream] == texts


def test_a_source_is_known_by_its_files_and_its_column(tmp_path: Path, write: Callable[..., SourceConfig]) -> None:
    part = write("a", ["one"])
    before = open_source(part).fingerprint()
    assert open_source(part).fingerprint() == before
    assert open_source(SourceConfig(part.source, path=part.path, text_column="id")).fingerprint() != before
    (file,) = (tmp_path / "rows").iterdir()
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    write("a", ["another", "size"])
    os.utime(file, ns=times)
    size = open_source(part).fingerprint()
    os.utime(file, ns=(times[0], times[1] + 1))
    time = open_source(part).fingerprint()
    write("b", ["more"])
    assert len({before, size, time, open_source(part).fingerprint()}) == 4
    source = open_source(part)
    assert source.label == f"{part.source} {tmp_path}/rows"
    assert loaded(source, tmp_path / "cache") == ["another", "size", "more"]


def test_a_cached_file_serves_a_second_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    source = open_source(SourceConfig("jsonl", path=str(tmp_path / "a.jsonl")))
    first = source.load(tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat()
    assert source.load(tmp_path / "cache").texts(0, 1) == first.texts(0, 1) == ["a"]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (tmp_path / "a.jsonl").write_text('{"text": "changed"}\n{"text":')
    for _ in range(2):
        with pytest.raises(ConfigError, match="row 2 is no JSON"):
            open_source(SourceConfig("jsonl", path=str(tmp_path / "a.jsonl"))).load(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [file], "of an unfinished file nothing is left"
