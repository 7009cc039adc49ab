"""A tokenizer learned from the run's own text: what it is, that it is found again, and what it reads."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.command import wait_until
from tests.data.tokenizer_kinds import SHORT
from tptrain.config import ConfigError, DataConfig, TokenizerConfig
from tptrain.data import ByteTokenizer, load_tokenizer, train_tokenizer
from tptrain.data.hf_tokenizer import HFTokenizer
from tptrain.data.lock import locked
from tptrain.data.sources import open_source
from tptrain.data.train_tokenizer import obtain_tokenizer

WORDS = [
    "the fox",
    " doesn't",
    " jump",
    " \u043b\u0438\u0441\u0430",
    "\n    return",
    " \u7d20\u65e9\u3044\u72d0",
    " 42",
    "==",
    " \U0001f98a",
]


def text_of(number: int, words: int) -> str:
    """Words in some order, each as often as its place says."""
    return "".join(WORDS[min(number * 7 + place * place, place * 5 + 1) % len(WORDS)] + str(place % 13) for place in range(words))


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """150 documents in a jsonl file, and a tokenizer to be learned from them."""
    rows = [json.dumps({"text": text_of(number, 40)}) for number in range(150)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    asked = TokenizerConfig("train", vocab_size=300)
    return DataConfig("jsonl", path=str(tmp_path / "a.jsonl"), seq_len=8, tokenizer=asked, store_dir=str(tmp_path / "stores"))


def obtain(data: DataConfig, lines: list[str] | None = None) -> HFTokenizer:
    tokenizer = obtain_tokenizer(data, [open_source(data)], (lines if lines is not None else []).append)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


# ---- what it is ----------------------------------------------------------------------------------------------


def byte_pairs(texts: list[str], size: int) -> set[bytes]:
    """The tokens of a byte-level BPE, learned by the book: of all pairs of neighbours within a word, the most frequent is joined."""
    word = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
    counts = Counter(tuple(bytes([byte]) for byte in found.encode()) for text in texts for found in word.findall(text))
    tokens = {bytes([byte]) for byte in range(256)}
    while len(tokens) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for pieces, count in counts.items():
            for pair in pairwise(pieces):
                pairs[pair] += count
        most = max(pairs.values())
        best = [pair for pair, count in pairs.items() if count == most]
        assert len(best) == 1, "the test's text has no ties"
        joined, merged = Counter[tuple[bytes, ...]](), best[0]
        for pieces, count in counts.items():
            done: list[bytes] = []
            for piece in pieces:
                if done and (done[-1], piece) == merged:
                    done[-1] += piece
                else:
                    done.append(piece)
            joined[tuple(done)] += count
        counts = joined
        tokens.add(b"".join(merged))
    return tokens


def test_it_is_a_byte_level_bpe(tmp_path: Path) -> None:
    """The tokens are those of the algorithm as it is written in a textbook, over words as GPT-2 cuts them."""
    draw = random.Random(5)  # whose pairs have no ties
    letters = "etaoinsrhld\u0430\u0435\u7d20\u7d22\u7d2847='\n "
    texts = ["".join(draw.choices(letters, [1 / (place + 3) for place in range(len(letters))], k=100_000))]
    (tmp_path / "a.txt").write_text(texts[0])
    asked = TokenizerConfig("train", vocab_size=301)
    tokenizer = obtain(DataConfig("text", path=str(tmp_path / "a.txt"), seq_len=8, tokenizer=asked, store_dir=str(tmp_path)))
    expected = byte_pairs(texts, 300)
    byte_of = {letter: byte for byte, letter in unicode_of_bytes().items()}
    (folder,) = tmp_path.glob("tokenizer-*")
    spec = json.loads((folder / "tokenizer.json").read_text())
    assert spec["pre_tokenizer"]["type"] == "ByteLevel", "words are cut short only while learning"
    vocabulary = spec["model"]["vocab"]
    found = {bytes(byte_of[letter] for letter in token) for token in vocabulary if token != "<|endoftext|>"}
    assert found == expected
    assert tokenizer.vocab_size == 301


def unicode_of_bytes() -> dict[int, str]:
    """GPT-2's visible character for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def test_every_text_comes_back(data: DataConfig) -> None:
    tokenizer = obtain(data)
    for name, text in SHORT.items():
        ids = tokenizer.encode(text)
        if name != "special":
            assert tokenizer.decode(ids) == text, name
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode("<|endoftext|>").tolist() == [tokenizer.end_of_document]
    assert len(tokenizer.encode("the fox doesn't jump")) < len("the fox doesn't jump") / 2, "it has learned from the text"
    assert tokenizer.encode(" a")[0] != tokenizer.encode("a")[0], "no blank is put before a text"


def test_an_end_token_of_one_s_own(data: DataConfig) -> None:
    data.tokenizer.end_token = "[END]"
    tokenizer = obtain(data)
    assert tokenizer.encode("[END]").tolist() == [tokenizer.end_of_document]
    assert tokenizer.decode([tokenizer.end_of_document]) == ""


def test_too_little_variety(data: DataConfig) -> None:
    data.tokenizer.vocab_size = 8192
    lines: list[str] = []
    tokenizer = obtain(data, lines)
    assert 300 < tokenizer.vocab_size < 8192
    assert lines[1].endswith("; the text has too little variety for the 8192 of data.tokenizer.vocab_size")
    assert lines[1].startswith(f"tokenizer: {tokenizer.vocab_size} ids from ")
    assert obtain(data).vocab_size == tokenizer.vocab_size


def test_no_text_at_all(data: DataConfig) -> None:
    Path(data.path).write_text("")
    assert obtain(data).vocab_size == 257


# ---- found again ---------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from tptrain.config import DataConfig, TokenizerConfig
from tptrain.data.sources import open_source
from tptrain.data.train_tokenizer import obtain_tokenizer
path, store_dir = sys.argv[1:]
data = DataConfig("jsonl", path=path, seq_len=8, tokenizer=TokenizerConfig("train", vocab_size=300), store_dir=store_dir)
obtain_tokenizer(data, [open_source(data)], lambda line: None)
"""


def test_the_same_text_gives_the_same_file(data: DataConfig, tmp_path: Path) -> None:
    """In two processes that start together, on one core and on all, and in a third one elsewhere."""
    tokenizer = obtain(data)
    command = [sys.executable, "-c", SCRIPT, data.path]
    threads = {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen([*command, str(tmp_path / where)], env={**threads, "TOKENIZERS_PARALLELISM": parallel}, stderr=subprocess.PIPE)
        for where, parallel in (("a", "false"), ("a", "true"), ("b", "true"))
    ]
    for process in started:
        assert (process.communicate(timeout=120)[1], process.returncode) == (b"", 0)
    for stores in ("a", "b"):
        (folder,) = (tmp_path / stores).iterdir()
        ours = next((tmp_path / "stores").iterdir())
        assert folder.name == ours.name
        assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
        assert (folder / "tokenizer.json").read_bytes() == (ours / "tokenizer.json").read_bytes()
        kept = load_tokenizer(data, folder)
        assert kept is not None
        assert kept.fingerprint() == tokenizer.fingerprint()


def test_found_again_by_what_it_was_learned_from(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    tokenizer = obtain(data, lines)
    (folder,) = (tmp_path / "stores").iterdir()
    assert re.fullmatch("tokenizer-[0-9a-f]{16}", folder.name)
    assert lines[0] == f"learning a tokenizer of 300 ids from {open_source(data).label}"
    assert re.fullmatch(r"tokenizer: 300 ids from 0.0 M characters in \d+\.\d s", lines[1])
    assert lines[2:] == [f"tokenizer: kept in {folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer, "_train", None)
        assert obtain(data, again := []).fingerprint() == tokenizer.fingerprint()
        assert again == [f"tokenizer: 300 ids in {folder}"]
    data.tokenizer.vocab_size = 299
    assert obtain(data).vocab_size == 299
    data.tokenizer.end_token = "[END]"
    assert obtain(data).end_token == "[END]"
    Path(data.path).write_text(json.dumps({"text": "another"}))
    obtain(data)
    assert len(list((tmp_path / "stores").iterdir())) == 4


def test_of_two_that_start_together_one_learns(data: DataConfig, tmp_path: Path) -> None:
    """And what a learner that was killed left is gone."""
    folder = Path(data.store_dir) / f"tokenizer-{train_tokenizer._fingerprint(data, [open_source(data)])[:16]}"
    (folder.parent / f".documents-{folder.name}-left").mkdir(parents=True)
    reports: list[list[str]] = [[], [], []]
    threads = [threading.Thread(target=obtain, args=(data, lines)) for lines in reports]
    with locked(folder.with_name(f".{folder.name}.lock"), lambda: None):
        for thread in threads:
            thread.start()
        wait_until(lambda: all(reports))
    for thread in threads:
        thread.join(60)
    assert [lines[0] for lines in reports] == [f"waiting for another process that learns {folder}"] * 3
    assert sorted(len(lines) for lines in reports) == [2, 2, 4]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_torn_file_is_never_seen(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that stops leave anything that looks whole: the file with the ids comes last, by a rename."""
    import tptrain.data.hf_tokenizer

    def stop(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tptrain.data.hf_tokenizer, "write_atomically", stop)
    with pytest.raises(ConfigError, match=r"stores cannot hold a tokenizer \(No space left on device\): use data.store_dir=FOLDER"):
        obtain(data)
    monkeypatch.undo()
    assert not list((tmp_path / "stores").rglob("*"))
    data.store_dir = str(tmp_path / "a.jsonl" / "stores")
    with pytest.raises(ConfigError, match=r"stores cannot hold a tokenizer \(Not a directory\): "):
        obtain(data)


def test_only_train_learns(data: DataConfig, tmp_path: Path) -> None:
    source = open_source(data)
    data.tokenizer = TokenizerConfig("byte")
    assert isinstance(obtain_tokenizer(data, [source], pytest.fail), ByteTokenizer)
    assert obtain_tokenizer(DataConfig("memorize", seq_len=8), [], pytest.fail) is None
    assert not (tmp_path / "stores").exists()


# ---- what it reads -------------------------------------------------------------------------------------------


class Read:
    """Stands in for the learning: keeps the pieces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int, piece: int = 100) -> None:
        self.pieces: list[str] = []
        monkeypatch.setattr(train_tokenizer, "_LIMIT_CHARACTERS", limit)
        monkeypatch.setattr(train_tokenizer, "_PIECE_CHARACTERS", piece)
        monkeypatch.setattr(train_tokenizer, "_train", self._train)

    def _train(self, data: DataConfig, texts: Iterator[str], *rest: object) -> object:
        self.pieces = list(texts)
        return SimpleNamespace(save=lambda folder: None, vocab_size=0)


def test_documents_are_spread_evenly(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the limit, of 1,280 documents of 8 characters, as of each source where there are several."""
    monkeypatch.setattr(train_tokenizer, "_BLOCK_DOCUMENTS", 10)
    Path(data.path).write_text("\n".join(json.dumps({"text": f"{number:08d}"}) for number in range(1280)) + "\n")
    source = open_source(data)
    for limit, sources in ((8 * 160 + 3, [source]), (2 * (8 * 160 + 3), [source, source])):
        read = Read(monkeypatch, limit)
        obtain_tokenizer(data, sources, lambda line: None)
        assert len(read.pieces) == 161 * len(sources)
        assert read.pieces[160] == read.pieces[-1]
        assert len(read.pieces[-1]) == 3
        numbers = [int(piece) for piece in read.pieces[:160]]
        assert len(set(numbers)) == 160
        assert all(sum(1 for number in numbers if first <= number < first + 160) == 20 for first in range(0, 1280, 160))
    read = Read(monkeypatch, 1 << 20)
    obtain_tokenizer(data, [source], lambda line: None)
    assert sorted(map(int, read.pieces)) == list(range(1280))


def test_a_stream_is_read_from_its_beginning(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data.streaming, data.val_fraction = True, 0.0
    texts = [text_of(number, 40) for number in range(150)]
    read = Read(monkeypatch, 1000, piece=64)
    obtain_tokenizer(data, [open_source(data)], lambda line: None)
    assert "".join(read.pieces) == "".join(texts)[:1000]
    assert max(map(len, read.pieces)) == 64


def test_a_bad_row_is_named(data: DataConfig) -> None:
    """Through the library that asks for the texts, as the one line that it is."""
    Path(data.path).write_text('{"text": "a"}\n{"text": null}\n')
    for streaming in (False, True):
        data.streaming = streaming
        with pytest.raises(ConfigError, match=r"^data.text_column=text is null in .*a.jsonl, row 2 \(columns: text\): "):
            obtain(data)
    source = SimpleNamespace(
        label="hub x", column="text", fingerprint=lambda: "f", load=None, stream=lambda: iter([{"text": "a"}, {"body": "b"}])
    )
    with pytest.raises(ConfigError, match=r"^data.text_column=text is missing in hub x, row 2 \(columns: body\): "):
        obtain_tokenizer(data, [source], lambda line: None)
    assert not [path for path in Path(data.store_dir).rglob("*") if path.is_file()]


def test_a_stop_ends_the_learning(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(KeyboardInterrupt):
        pass

    def stop(*arguments: object) -> Iterator[str]:
        yield "a"
        raise Stopped

    monkeypatch.setattr(train_tokenizer, "_texts", stop)
    with pytest.raises(Stopped):
        obtain(data)


def test_text_without_blanks_does_not_take_for_ever(tmp_path: Path) -> None:
    """A quarter of a million letters in one word take about as long as in short ones; not cut, nine times as long."""
    letters = random.Random(0).choices("ACGT", k=250_000)
    seconds = {}
    for name, text in (
        ("warm", "the libraries are imported"),
        ("words", "".join(letter + " " * (place % 8 == 0) for place, letter in enumerate(letters))),
        ("one", "".join(letters)),
    ):
        (tmp_path / f"{name}.txt").write_text(text)
        asked = TokenizerConfig("train", vocab_size=4096)
        config = DataConfig("text", path=str(tmp_path / f"{name}.txt"), seq_len=8, tokenizer=asked, store_dir=str(tmp_path / name))
        began = time.process_time()
        obtain(config)
        seconds[name] = time.process_time() - began
    assert seconds["one"] < 3 * seconds["words"], seconds
