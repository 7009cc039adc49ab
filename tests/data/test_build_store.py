"""A store holds its source's documents, in order, whoever tokenised them; and what cannot be built is refused in one line."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import tptrain.data.shards
from tests.data.row_source import RowSource, build
from tptrain.config_error import ConfigError
from tptrain.data.documents import Documents, write_documents
from tptrain.data.shards import plan
from tptrain.data.splits import hold_out
from tptrain.data.store import Split, TokenStore
from tptrain.data.tokenizers import ByteTokenizer
from tptrain.data.workers import Workers

Read = Callable[[Split], list[list[int]]]

TEXTS = [
    "plain",
    "",
    "naïve 👩‍👩‍👧 末尾",
    "a\r\nb\rc\n",
    "\ufeffmarked",
    "x" * 5_000_000,
    "",
    "\0",
    *(f"row {n} " * (n % 50) for n in range(3000)),
]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 50 kB of text, and batches of 4 kB."""
    for name, value in (("_MOST_BYTES", 50_000), ("_LEAST_BYTES", 50_000), ("_BATCH_BYTES", 4_000), ("_ROWS_AT_ONCE", 700)):
        monkeypatch.setattr(tptrain.data.shards, name, value)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but meta.json, in which times differ."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}


# ---- what is stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_fraction", [0.0, 0.25])
@pytest.mark.usefixtures("small_shards")
def test_documents_come_back_in_order(tmp_path: Path, documents: Read, val_fraction: float) -> None:
    folder = build(RowSource(list(TEXTS)), tmp_path, val_fraction=val_fraction)
    store = TokenStore.open(folder)
    held = hold_out(len(TEXTS), None, val_fraction).mask(0, len(TEXTS))
    expected = [[*text.encode(), 256] for text in TEXTS]
    assert documents(store.train) == [ids for ids, out in zip(expected, held, strict=True) if not out]
    assert documents(store.val) == [ids for ids, out in zip(expected, held, strict=True) if out]
    assert len(list(folder.glob("train-*.tokens"))) > 5
    for split in (store.train, store.val):
        assert split.offsets[-1] == split.num_tokens
        assert (split.offsets.dtype, len(split.offsets)) == (np.int64, split.num_documents + 1)
        for index in range(0, split.num_documents, 97):
            assert split.document(index).tolist() == documents(split)[index] if index < 200 else True
        for index in (-1, split.num_documents):
            with pytest.raises(IndexError):
                split.document(index)
    assert (store.tokenizer, store.vocab_size, store.end_of_document, store.source) == ("byte", 257, 256, "jsonl")


@pytest.mark.usefixtures("small_shards")
def test_processes_write_the_very_same_files(tmp_path: Path) -> None:
    alone, several = (build(RowSource(list(TEXTS)), tmp_path / str(num_proc), num_proc) for num_proc in (1, 3))
    assert contents(alone) == contents(several)
    assert len(contents(alone)) > 20


@pytest.mark.parametrize(("texts", "splits"), [(["0123456789"], (["01234567"], ["89"])), ([""], ([""], [""])), ([], ([], []))])
def test_one_document_and_none(tmp_path: Path, documents: Read, texts: list[str], splits: tuple[list[str], list[str]]) -> None:
    store = TokenStore.open(build(RowSource(list(texts)), tmp_path, val_fraction=0.2))
    assert (documents(store.train), documents(store.val)) == tuple([[*text.encode(), 256] for text in part] for part in splits)


@pytest.mark.usefixtures("small_shards")
def test_ranges_hold_every_document_once_and_little_more_than_they_may(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = ["é" * int(size) for size in generator.choice([0, 1, 30, 1000, 40_000], 5000, p=[0.4, 0.3, 0.2, 0.09, 0.01])]
    source = RowSource(list(texts)).load(tmp_path)
    planned = plan(source)
    assert planned.total_bytes == 2 * sum(map(len, texts))
    assert [part.number for part in planned.ranges] == list(range(len(planned.ranges)))
    assert [number for part in planned.ranges for number in range(part.first, part.last)] == list(range(5000))
    for part in planned.ranges:
        size = sum(2 * len(text) for text in texts[part.first : part.last])
        assert size == part.text_bytes(source)
        assert size <= 50_000 + 80_000


def test_memory_is_a_batch_not_a_shard(tmp_path: Path) -> None:
    """10 million bytes of text in one shard or two: no call sees more than a batch of it."""
    source = RowSource(["z" * 1000] * 10_000)
    seen: list[int] = []

    class Watching(ByteTokenizer):
        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            seen.append(sum(map(len, texts)))
            return super().encode_batch(texts)

    build(source, tmp_path, tokenizer=Watching())
    assert sum(seen) == 10_000_000
    assert max(seen) <= 1 << 20


def test_what_the_ids_follow_from_names_the_folder(tmp_path: Path) -> None:
    class Other(ByteTokenizer):
        def fingerprint(self) -> str:
            return "another"

    folders = [
        build(RowSource(["a", "b"]), tmp_path),
        build(RowSource(["a", "b"]), tmp_path, val_fraction=0.5),
        build(RowSource(["a", "b"], known_as="others"), tmp_path),
        build(RowSource(["a", "b"]), tmp_path, tokenizer=Other()),
    ]
    assert len(set(folders)) == 4
    assert build(RowSource(["a", "b"]), tmp_path, num_proc=2) == folders[0]


@dataclass
class Saving(ByteTokenizer):
    """A tokenizer with a file."""

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"a": 1}')


def test_the_tokenizer_is_in_the_store_and_is_checked(tmp_path: Path) -> None:
    source, lines = RowSource(["a", "b"]), list[str]()
    folder = build(source, tmp_path, tokenizer=Saving())
    assert (folder / "tokenizer.json").read_text() == '{"a": 1}'
    (folder / "tokenizer.json").write_text('{"a": 2}')
    build(source, tmp_path, tokenizer=Saving(), report=lines.append)
    assert lines[0] == f"{folder}/tokenizer.json, bytes 0 to 7: the checksum is another: making it anew"
    assert (folder / "tokenizer.json").read_text() == '{"a": 1}'


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.usefixtures("small_shards")
def test_a_text_that_cannot_be_used_is_one_line_from_any_process(tmp_path: Path, num_proc: int) -> None:
    rows: list[str | None] = ["word " * 50] * 2000
    rows[1500] = None
    with pytest.raises(ConfigError) as caught:
        build(RowSource(rows), tmp_path, num_proc)
    assert str(caught.value).startswith("data.text_column=text is null in rows.jsonl, row 1501 (columns: text): ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Alien(ByteTokenizer):
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([257]) for _ in texts]


@pytest.mark.usefixtures("small_shards")
def test_an_id_beyond_the_vocabulary_is_an_error_not_another_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not all in range\(257\)"):
        build(RowSource(["a"]), tmp_path, tokenizer=Alien())
    with pytest.raises(RuntimeError, match=r"not all in range\(257\)"):
        build(RowSource(["a" * 1000] * 200), tmp_path, 2, tokenizer=Alien())
    assert list(tmp_path.iterdir()) == []


class Slow(ByteTokenizer):
    """Takes its time, so that there is somebody to kill."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        time.sleep(0.2)
        return super().encode_batch(texts)


def workers_of(parent: int) -> list[int]:
    """Processes that tokenise for `parent`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"tptrain.data.workers" in word for word in words) and str(parent).encode() in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.usefixtures("small_shards")
def test_a_killed_worker_is_one_line_and_the_others_end(tmp_path: Path) -> None:
    def kill() -> None:
        while len(workers_of(os.getpid())) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(workers_of(os.getpid())[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ConfigError) as caught:
        build(RowSource(["word " * 200] * 2000), tmp_path, 2, tokenizer=Slow())
    killer.join()
    message = "data.num_proc=2 was too much: a process that tokenised was killed by SIGKILL: use a smaller data.num_proc"
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []
    assert workers_of(os.getpid()) == []


def test_workers_do_not_hear_the_terminal_and_do_not_wait_to_be_read(tmp_path: Path) -> None:
    """SIGINT and SIGTERM to a worker change nothing: the builder decides."""
    dataset = write_documents(["a b c"] * 100, "text", tmp_path / "rows.arrow")
    source = Documents(dataset, "text", None, str, ("text",))
    work = tptrain.data.shards.Work(source, ByteTokenizer(), hold_out(100, None, 0.0), tmp_path)
    with Workers(work, 1) as workers:
        (part,) = plan(source).ranges
        assert [found for found, _ in workers.write([part], lambda text, stored: None)] == [part]
        (worker,) = workers_of(os.getpid())
        assert os.getpgid(worker) != os.getpgid(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        assert [found for found, _ in workers.write([part], lambda text, stored: None)] == [part]
    assert workers_of(os.getpid()) == []


def test_what_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = build(RowSource(["a", "b", "c"]), tmp_path, report=lines.append)
    build(RowSource(["a", "b", "c"]), tmp_path, report=lines.append)
    assert lines[0] == "tokenising rows: 3 documents"
    assert re.fullmatch(rf"6 tokens in \d+\.\d s -> {re.escape(str(folder))}", lines[1])
    assert lines[2:] == [f"jsonl: 6 tokens in {folder}"]
