"""A damaged store is never used: the file is named, and what was there is made again, to the byte."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tptrain.data.shards
from tests.data.row_source import RowSource, build
from tptrain.data.build import short
from tptrain.data.checksums import BLOCK_BYTES
from tptrain.data.meta import read_meta
from tptrain.data.store import StoreError, TokenStore
from tptrain.data.tokens import MARK

ROWS = [f"row {number} " * (number % 40) for number in range(4000)]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> RowSource:
    for name in ("_MOST_BYTES", "_LEAST_BYTES"):
        monkeypatch.setattr(tptrain.data.shards, name, 100_000)
    return RowSource(list(ROWS))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}


def flip(path: Path, place: int) -> None:
    """Change one byte, and leave size and times as they are, as a bad disk does."""
    times = path.stat()
    with open(path, "r+b") as file:
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 0x10]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def touched_flip(path: Path) -> str:
    flip(path, path.stat().st_size - 1)
    os.utime(path)
    return "the checksum is another"


def truncate(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size - 2)
    return f" has {size - 2} bytes, not {size}"


def remove(path: Path) -> str:
    path.unlink()
    return " cannot be read (No such file or directory)"


@pytest.mark.parametrize("damage", [touched_flip, truncate, remove])
@pytest.mark.parametrize("name", ["train-00003.tokens", "val-00000.tokens", "train.offsets", "val.offsets"])
def test_found_at_the_start_named_and_made_again(source: RowSource, tmp_path: Path, name: str, damage: Callable[[Path], str]) -> None:
    folder, lines = build(source, tmp_path), list[str]()
    before = contents(folder)
    problem = damage(folder / name)
    inodes = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert build(source, tmp_path, report=lines.append) == folder
    assert lines[0].startswith(f"{folder}/{name}")
    assert problem in lines[0]
    assert contents(folder) == before
    same = {path.name for path in folder.iterdir() if path.stat().st_ino == inodes.get(path.name)}
    if "offsets" in name:
        assert not same, "all of it is new"
    else:
        number = name[-12:-7]
        assert set(before) - same == {f"{split}-{number}.tokens{end}" for split in ("train", "val") for end in ("", ".sums")}
        assert lines[1:] == [f"1 shard made anew in {folder}"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    again: list[str] = []
    build(source, tmp_path, report=again.append)
    assert again == [f"jsonl: {short(read_meta(folder).tokens)} tokens in {folder}"]


@pytest.mark.parametrize("name", ["train-00003.tokens", "train-00003.tokens.sums", "train.offsets", "train.offsets.sums"])
def test_found_by_a_reader_marked_and_made_again_at_the_next_start(source: RowSource, tmp_path: Path, name: str) -> None:
    folder, lines = build(source, tmp_path), list[str]()
    before = contents(folder)
    flip(folder / name, (folder / name).stat().st_size - 1)
    build(source, tmp_path, report=lines.append)
    assert lines == [f"jsonl: {short(read_meta(folder).tokens)} tokens in {folder}"], "nothing shows it"
    store = TokenStore.open(folder)
    with pytest.raises(StoreError) as caught:
        store.train.offsets if "offsets" in name else store.train.tokens[:]
    assert str(caught.value).startswith(f"{folder}/{name}")
    assert str(caught.value).endswith(": start the run again, and it is built anew")
    assert (folder / MARK).exists()
    build(source, tmp_path, report=lines.append)
    assert lines[1].startswith(f"{folder}/{name}")
    assert contents(folder) == before
    assert TokenStore.open(folder).train.tokens[:].size == store.train.num_tokens


def test_several_shards(source: RowSource, tmp_path: Path) -> None:
    folder, lines = build(source, tmp_path), list[str]()
    before = contents(folder)
    truncate(folder / "train-00000.tokens")
    remove(folder / "train-00002.tokens.sums")
    touched_flip(folder / "val-00005.tokens")
    build(source, tmp_path, report=lines.append)
    assert len(lines) == 4
    assert lines[-1] == f"3 shards made anew in {folder}"
    assert contents(folder) == before


def test_other_times_are_checked_and_noted(source: RowSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a copy: nothing is built."""
    folder = build(source, tmp_path)
    copy = tmp_path / "copy" / folder.name
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    lines: list[str] = []
    assert build(source, tmp_path / "copy", report=lines.append) == copy
    assert lines == [f"jsonl: {short(read_meta(folder).tokens)} tokens in {copy}"]
    checked: list[str] = []
    monkeypatch.setattr(tptrain.data.repair, "check_file", lambda folder, note: checked.append(note.name))
    build(source, tmp_path / "copy")
    assert checked == []
    (copy / MARK).write_text("")
    build(source, tmp_path / "copy")
    assert sorted(checked) == sorted(note.name for note in read_meta(folder).files)
    assert not (copy / MARK).exists()


@pytest.mark.parametrize("rows", [[row.upper() for row in ROWS], ROWS[:-5], [*ROWS, "one more"]])
def test_a_source_that_changed_unnoticed_is_built_anew_not_mixed(source: RowSource, tmp_path: Path, rows: list[str]) -> None:
    folder, lines = build(source, tmp_path), list[str]()
    truncate(folder / "train-00001.tokens")
    assert build(RowSource(list(rows)), tmp_path, report=lines.append) == folder
    fresh = build(RowSource(list(rows)), tmp_path / "fresh")
    assert contents(folder) == contents(fresh)
    assert lines[-1].endswith(str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", folder.name]


def test_meta_with_a_changed_digit(source: RowSource, tmp_path: Path) -> None:
    folder = build(source, tmp_path)
    before, meta = contents(folder), (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(meta.replace('"vocab_size": 257', '"vocab_size": 258'))
    with pytest.raises(StoreError, match=r"meta\.json is damaged"):
        TokenStore.open(folder)
    lines: list[str] = []
    build(source, tmp_path, report=lines.append)
    assert lines[0] == f"{folder}/meta.json is missing or damaged: making all of the store anew"
    assert contents(folder) == before
    assert TokenStore.open(folder).vocab_size == 257


def test_what_is_no_store_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no token store"):
        TokenStore.open(tmp_path / "missing")
    for content in ("", "[", "[]", "{}", '{"format": 2}', '{"format": 2, "crc32": 1}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(StoreError, match=r"no token store|damaged"):
            TokenStore.open(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 999}')
    with pytest.raises(StoreError, match="format 999"):
        TokenStore.open(tmp_path)


def test_every_byte_of_a_small_store_counts(tmp_path: Path) -> None:
    """Flip each byte of each file in turn: reading all of the store refuses, or gives what was written."""
    folder = build(RowSource(["ab", "c", "defg", ""]), tmp_path)
    store = TokenStore.open(folder)
    expected = [split.document(index).tolist() for split in (store.train, store.val) for index in range(split.num_documents)]
    found = 0
    for path in sorted(folder.iterdir()):
        for place in range(path.stat().st_size):
            flip(path, place)
            try:
                store = TokenStore.open(folder)
                read = [split.document(index).tolist() for split in (store.train, store.val) for index in range(split.num_documents)]
                assert read == expected, f"{path.name}, byte {place}"
            except StoreError:
                found += 1
            flip(path, place)
    assert found > 100
    assert BLOCK_BYTES > 1000, "each file is one block"
