"""What cannot be read as text is refused in one line that names the file, the row and the columns that exist."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tptrain.config_error import ConfigError
from tptrain.data.sources import Source, open_source
from tptrain.data_config import SourceConfig

CORRECT = "correct or remove that row, or use data.text_column=COLUMN with one that always holds text"
LEAVE_OUT = "correct it, or use a data.path that leaves it out"


def refusal(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(source: Source, cache: Path) -> None:
    documents = source.load(cache)
    documents.texts(0, len(documents))


# ---- jsonl -----------------------------------------------------------------------------------------------

FIELDS = {
    '{"id": 1, "body": "x"}': "is missing in {path}, row 3 (columns: id, body)",
    "{}": "is missing in {path}, row 3 (columns: none)",
    '{"text": null, "id": 1}': "is null in {path}, row 3 (columns: text, id)",
    '{"text": 5}': "is int, not text in {path}, row 3 (columns: text)",
    '{"text": 0.5}': "is float, not text in {path}, row 3 (columns: text)",
    '{"text": true}': "is bool, not text in {path}, row 3 (columns: text)",
    '{"text": ["a"]}': "is list, not text in {path}, row 3 (columns: text)",
    '{"text": {"a": "b"}}': "is dict, not text in {path}, row 3 (columns: text)",
    '{"text": "\\ud83d"}': "holds half a surrogate pair, which is no text in {path}, row 3 (columns: text)",
}
FILES = {
    b'{"text": "b': "whose row 3 is no JSON (Unterminated string",
    b'{"text": "b"} {"text": "c"}': "whose row 3 is no JSON (Extra data",
    b'{"text": "b\tc"}': "whose row 3 is no JSON (Invalid control character",
    b"[" * 100_000: "whose row 3 is no JSON (",
    b'"b"': "whose row 3 is str, not an object with columns",
    b'["b"]': "whose row 3 is list, not an object with columns",
    b"null": "whose row 3 is null, not an object with columns",
    b'{"text": "\xe9"}': "whose row 3 is not UTF-8 text at byte 10 of it",
    b"\xef\xbb\xbf{}": "whose row 3 is no JSON (Unexpected UTF-8 BOM",
}


def jsonl(tmp_path: Path, row: bytes, packed: bool = False) -> tuple[Source, Path]:
    content = b'{"text": "a"}\n\n' + row + b'\n{"text": "d"}\n'
    path = tmp_path / "b.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    (tmp_path / "a.jsonl").write_text('{"text": "in another file"}\n' * 5)
    return open_source(SourceConfig("jsonl", path=f"{tmp_path}/*.jsonl")), path


@pytest.mark.parametrize("row", FIELDS)
def test_a_field_of_jsonl(tmp_path: Path, row: str) -> None:
    source, path = jsonl(tmp_path, row.encode())
    expected = f"data.text_column=text {FIELDS[row].format(path=path)}: {CORRECT}"
    assert refusal(source.load, tmp_path / "cache") == expected
    assert refusal(list, source.stream()) == expected


@pytest.mark.parametrize("row", FILES, ids=lambda row: repr(row[:12]))
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_row_that_is_no_json(tmp_path: Path, row: bytes, packed: bool) -> None:
    source, path = jsonl(tmp_path, row, packed)
    for message in (refusal(source.load, tmp_path / "cache"), refusal(list, source.stream())):
        assert message.startswith(f"data.path={tmp_path}/*.jsonl names {path}, {FILES[row]}")
        assert message.endswith(f": {LEAVE_OUT}")


def test_an_array_counts_its_elements(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"id": 1}], indent=2))
    source = open_source(SourceConfig("jsonl", path=str(tmp_path / "a.json")))
    assert refusal(source.load, tmp_path / "cache").startswith(
        f"data.text_column=text is missing in {tmp_path}/a.json, row 3 (columns: id)"
    )


@pytest.mark.parametrize("packing", ["gzip", "zstd", "bz2", "xz"])
def test_a_truncated_file(tmp_path: Path, packing: str) -> None:
    content = b"".join(b'{"text": "%d"}\n' % number for number in range(20_000))
    if packing == "zstd":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as file:
            file.write(content)
        packed = sink.getvalue().to_pybytes()
    else:
        packed = {"gzip": gzip, "bz2": __import__("bz2"), "xz": __import__("lzma")}[packing].compress(content)
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    source = open_source(SourceConfig("jsonl", path=str(path)))
    message = refusal(source.load, tmp_path / "cache")
    assert message.startswith(f"data.path={path} names {path}, wh"), "never fewer documents, silently"
    assert message.endswith(f": {LEAVE_OUT}")


def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # opens, and fails to read, for root as well
    source = open_source(SourceConfig("jsonl", path=str(tmp_path)))
    assert "a.jsonl, which cannot be read after row 0 (" in refusal(source.load, tmp_path / "cache")


# ---- parquet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"text": pa.array([5, 6])}, "is int64, not text in {path}, row 1 (columns: text, id)"),
        ({"text": pa.array([b"5", b"6"])}, "is binary, not text in {path}, row 1 (columns: text, id)"),
        ({"text": pa.array([["a"], ["b"]])}, "is list<element: string>, not text in {path}, row 1 (columns: text, id)"),
        ({"text": pa.nulls(2)}, "is null in {path}, row 1 (columns: text, id)"),
        ({"body": pa.array(["a", "b"])}, "is missing in {path}, row 1 (columns: body, id)"),
    ],
)
def test_a_column_of_parquet_also_where_an_earlier_file_has_text(tmp_path: Path, column: dict[str, pa.Array], message: str) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({**column, "id": [1, 2]}), tmp_path / "b.parquet")
    source = open_source(SourceConfig("parquet", path=str(tmp_path)))
    expected = f"data.text_column=text {message.format(path=tmp_path / 'b.parquet')}: {CORRECT}"
    assert refusal(source.load, tmp_path / "cache") == expected
    assert refusal(source.stream) == expected


def test_a_null_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["c", "d", None]}), tmp_path / "b.parquet", row_group_size=2)
    documents = open_source(SourceConfig("parquet", path=str(tmp_path))).load(tmp_path / "cache")
    assert documents.texts(0, 4) == ["a", "b", "c", "d"]
    message = refusal(documents.texts, 1, 5)
    assert message.startswith(f"data.text_column=text is null in {tmp_path}/b.parquet, row 3 (columns: text")


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(2, pa.array([b"ok", b"\xff\xfe"]).buffers()[1], pa.array([b"ok", b"\xff\xfe"]).buffers()[2])
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    documents = open_source(SourceConfig("parquet", path=str(tmp_path))).load(tmp_path / "cache")
    assert documents.texts(0, 1) == ["ok"]
    assert refusal(documents.texts, 0, 2).startswith(
        f"data.text_column=text is not UTF-8 text in {tmp_path}/a.parquet, row 2 (columns: text)"
    )


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    source = open_source(SourceConfig("parquet", path=str(tmp_path)))
    expected = f"data.path={tmp_path} names {tmp_path}/a.parquet, which is no parquet file ("
    assert refusal(source.load, tmp_path / "cache").startswith(expected)
    pq.write_table(pa.table({"text": [f"row {number}" * 50 for number in range(400)]}), tmp_path / "a.parquet", row_group_size=100)
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(2).column(0).dictionary_page_offset
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[start : start + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(content)
    message = refusal(open_source(SourceConfig("parquet", path=str(tmp_path))).load, tmp_path / "cache")
    assert message.startswith(f"data.path={tmp_path} names {tmp_path}/a.parquet, which cannot be read from row ")


def test_a_name_that_datasets_misreads(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a::b.parquet")
    source = open_source(SourceConfig("parquet", path=str(tmp_path)))
    assert "a::b.parquet, whose name has '::' in it: " in refusal(source.load, tmp_path / "cache")


# ---- text ------------------------------------------------------------------------------------------------


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    source = open_source(SourceConfig("text", path=str(tmp_path)))
    for message in (refusal(source.load, tmp_path / "cache"), refusal(list, source.stream())):
        assert message.startswith(f"data.path={tmp_path} names {tmp_path}/b.txt, which is not UTF-8 text at byte 3: ")


# ---- saved -----------------------------------------------------------------------------------------------


def test_saved_refusals(tmp_path: Path) -> None:
    def opened(path: object, split: str | None = None, **keys: str) -> Source:
        return open_source(SourceConfig("saved", path=path, **keys), split=split)

    data = datasets.Dataset.from_dict({"text": ["a", None, "c"], "id": [1, 2, 3]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    one, splits = tmp_path / "one", tmp_path / "splits"
    made = "use data.path=FOLDER, made by save_to_disk of Hugging Face datasets"
    assert refusal(opened, "/no/such") == f"data.path=/no/such does not exist (from {Path.cwd()}): {made}"
    assert refusal(opened, str(tmp_path)) == f"data.path={tmp_path} was not made by save_to_disk: {made}"
    assert refusal(opened, ["a", "b"]) == "data.path=[a,b] is not one folder: use data.path=FOLDER, made by save_to_disk"
    assert refusal(opened, str(splits), "dev") == f"data.val_split=dev is no split of {splits}: use train or test"
    message = refusal(lambda: opened(str(splits), split="dev"))
    assert message.startswith("data.val_split=dev")
    assert refusal(lambda: open_source(SourceConfig("saved", path=str(splits), split="dev"))) == (
        f"data.split=dev is no split of {splits}: use train or test"
    )
    expected = f"data.val_split=test names a split, but {one} holds one data set without splits: leave it away"
    assert refusal(opened, str(one), "test") == expected
    missing = f"data.text_column=body is missing in {one}, row 1 (columns: text, id): {CORRECT}"
    assert refusal(opened(str(one), text_column="body").load, tmp_path) == missing
    assert refusal(opened(str(one), text_column="id").stream) == (
        f"data.text_column=id is int64, not text in {one}, row 1 (columns: text, id): {CORRECT}"
    )
    documents = opened(str(splits), "test").load(tmp_path)
    assert refusal(documents.texts, 0, 3) == f"data.text_column=text is null in {splits}/test, row 2 (columns: text, id): {CORRECT}"
    for kind in ("jsonl", "parquet"):
        message = refusal(open_source, SourceConfig(kind, path=str(one)))
        assert message == f"data.path={one} is a folder made by save_to_disk: use data.source=saved data.path={one}"
    next(one.glob("*.arrow")).unlink()
    assert refusal(opened(str(one)).load, tmp_path).startswith(f"data.path={one} cannot be read as save_to_disk left it (")


# ---- where files are -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "endings"), [("jsonl", ".jsonl or .json"), ("parquet", ".parquet"), ("text", ".txt or .md")])
def test_no_files(tmp_path: Path, kind: str, endings: str) -> None:
    def opened(path: object) -> Source:
        return open_source(SourceConfig(kind, path=path), "data.val_sets.x")

    key, use = "data.val_sets.x.path", f"use a file, a folder or a glob of {kind} files"
    assert refusal(opened, "/no/such") == f"{key}=/no/such does not exist (from {Path.cwd()}): {use}"
    assert refusal(opened, [str(tmp_path / "*.x")]) == (
        f"{key}={tmp_path}/*.x matches no file (from {Path.cwd()}): use a glob that matches {kind} files"
    )
    assert refusal(opened, str(tmp_path)) == (
        f"{key}={tmp_path} holds no {endings} file: name other files by a glob: {key}='{tmp_path}/**/*'"
    )
    assert refusal(opened, []) == f"{key}=[] names no {kind}: use {key}=FILE, FOLDER or 'GLOB'"
    assert refusal(opened, [str(tmp_path), None]).startswith(f"{key}=[{tmp_path},null] names no {kind}: ")
    os.mkfifo(tmp_path / "pipe")
    assert refusal(opened, str(tmp_path / "pipe")) == f"{key}={tmp_path}/pipe is no regular file: {use}"


def test_a_split_of_what_has_none() -> None:
    message = refusal(open_source, SourceConfig("python_docs"), "data", "test")
    assert message == "data.val_split=test names a split, and source=python_docs has none: leave it away"
    for kind in ("memorize", "mixture"):
        with pytest.raises(ValueError, match="no source of documents"):
            open_source(SourceConfig(kind))


def test_opening_imports_nothing_slow(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "state.json").write_text("{}")
    script = """
import sys
from tptrain.data.sources import open_source
from tptrain.data_config import SourceConfig
folder = sys.argv[1]
for part in (SourceConfig("jsonl", path=folder + "/*.jsonl"), SourceConfig("parquet", path=folder + "/*"), SourceConfig("python_docs"),
             SourceConfig("saved", path=folder), SourceConfig("hub", name="owner/name")):
    assert len(open_source(part).fingerprint()) == 64
print(*(name for name in ("torch", "datasets", "huggingface_hub", "pyarrow", "pandas") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
