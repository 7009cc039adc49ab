"""What is stored is what is in the files, to the byte."""

import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tptrain.config import Config, ConfigError, DataConfig
from tptrain.data import Split, TokenStore, prepare
from tptrain.data.sources import open_source
from tptrain.data.sources.text import open_text

Documents = Callable[[Split], list[list[int]]]

CONTENTS: dict[str, bytes] = {
    "ascii.txt": b"plain\ntext\n",
    "crlf.txt": b"one\r\ntwo\r\n",
    "cr.txt": b"old\rmac\r",
    "bom.md": b"\xef\xbb\xbfmarked\n",
    "emoji.md": "naïve 👩‍👩‍👧 😀 末尾".encode(),
    "empty.txt": b"",
    "separators.txt": "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\x00h".encode(),
    "only_newlines.txt": b"\n\r\n\r\n\n",
    "sub/deeper/no_final_newline.txt": b"x\ny",
    "cut_by_a_block.txt": b"a" * ((1 << 20) - 1) + "é€😀".encode() * 3,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "notes"


def test_each_document_is_its_bytes_and_the_end(folder: Path, make_config: Callable[..., Config], documents: Documents) -> None:
    store = TokenStore.open(prepare(make_config("text", path=str(folder), val_fraction=0.3)))
    train, val = documents(store.train), documents(store.val)
    assert sorted(train + val) == sorted([*content, 256] for content in CONTENTS.values())  # complete, and each once
    assert len(val) == 3
    assert store.train.num_documents == 7
    assert store.train.tokens.dtype == np.uint16
    assert (store.tokenizer, store.end_of_document, store.vocab_size, store.source) == ("byte", 256, 257, "text")
    assert [store.val.document(index).tolist() for index in range(3)] == val


def test_the_seed_does_not_choose_the_split(folder: Path, make_config: Callable[..., Config]) -> None:
    one, other = (prepare(make_config("text", path=str(folder), seed=seed)) for seed in (1, 2))
    assert one == other


def test_no_validation_split(folder: Path, make_config: Callable[..., Config], documents: Documents) -> None:
    store = TokenStore.open(prepare(make_config("text", path=str(folder), val_fraction=0.0, eval_steps=0)))
    assert documents(store.train) == [[*CONTENTS[name], 256] for name in sorted(CONTENTS)]
    assert (store.val.num_tokens, store.val.num_documents) == (0, 0)


def test_a_lone_document_gives_its_tail(tmp_path: Path, make_config: Callable[..., Config], documents: Documents) -> None:
    (tmp_path / "one.txt").write_text("0123456789é" * 10)
    store = TokenStore.open(prepare(make_config("text", path=str(tmp_path / "one.txt"), val_fraction=0.1)))
    (head,), (tail,) = documents(store.train), documents(store.val)
    assert bytes(tail[:-1]).decode() == "0123456789é"
    assert bytes(head[:-1]).decode() == "0123456789é" * 9
    assert head[-1] == tail[-1] == 256


# ---- which files -----------------------------------------------------------------------------------------


def listed(path: str) -> list[str]:
    return list(open_text(path, "data").files.names)


def test_a_folder_is_its_txt_and_md_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.TXT", "d.py", "e", ".hidden.txt", ".git/f.txt", "sub/g.md", "sub/test/h.txt", "txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert listed(str(tmp_path)) == ["a.txt", "b.md", "c.TXT", "sub/g.md", "sub/test/h.txt"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("x")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling.txt").symlink_to(tmp_path / "nothing")
    assert listed(str(tmp_path / "data")) == ["link/a.txt"]


def test_a_glob_is_what_it_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("src/a.py", "src/b.rst", "src/sub/c.py", "d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "src" / "pipe.py")  # reading it would wait for ever
    assert listed(f"{tmp_path}/src/**/*.py") == ["a.py", "sub/c.py"]
    assert listed(f"{tmp_path}/src/**") == ["a.py", "b.rst", "sub/c.py"]
    monkeypatch.chdir(tmp_path)
    assert listed("s*/[ab].*") == ["src/a.py", "src/b.rst"]
    assert listed("*.py") == ["d.py"]
    assert listed("d.py") == ["d.py"]


def test_a_name_with_wildcards_that_exists_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    (tmp_path / "a1.txt").write_text("x")
    assert listed(str(tmp_path / "a[1].txt")) == ["a[1].txt"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert listed("~/a.txt") == ["a.txt"]
    assert listed("~/*.txt") == ["a.txt"]


def test_a_file_name_need_not_be_utf8(tmp_path: Path, make_config: Callable[..., Config], documents: Documents) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_bytes(b"abc")
    store = TokenStore.open(prepare(make_config("text", path=str(tmp_path), val_fraction=0.0, eval_steps=0)))
    assert documents(store.train) == [[97, 98, 99, 256]]


# ---- python_docs -----------------------------------------------------------------------------------------


def test_python_docs_is_the_standard_library_and_its_topics(make_config: Callable[..., Config], documents: Documents) -> None:
    from pydoc_data.topics import topics

    lines: list[str] = []
    store = TokenStore.open(prepare(make_config("python_docs", seq_len=256), lines.append))
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    expected = [text.encode() for text in topics.values()]
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not skipped & set(relative.parts) and relative.as_posix() != "pydoc_data/topics.py":
            expected.append(content)
    found = documents(store.train) + documents(store.val)
    assert all(document[-1] == 256 for document in found)
    assert sorted(bytes(document[:-1]) for document in found) == sorted(expected)
    assert store.val.num_documents == round(0.05 * len(expected))
    total = sum(len(content) + 1 for content in expected)
    assert store.train.num_tokens + store.val.num_tokens == total
    assert lines[0] == f"tokenising python_docs: {len(expected)} documents"
    assert lines[1].startswith(f"{total / 1e6:.1f}M tokens in ")
    assert lines[1].endswith(f" s -> {store.folder}")


def test_python_docs_come_in_the_order_of_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    for name in ("b.py", "a.py", "a-b.py", "test/x.py", "pkg/tests/y.py", "pkg/z.py", "latin.py", "notes.txt"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_bytes(b"# \xe9\n" if name == "latin.py" else b"pass\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    names = open_source(DataConfig("python_docs", seq_len=8)).load(tmp_path / "cache").names
    assert names is not None
    assert names[:4] == ("a-b.py", "a.py", "b.py", "pkg/z.py")
    assert list(names[4:]) == sorted(names[4:])
    assert "topic:assert" in names


@pytest.mark.parametrize("changed", ["a.py", "pydoc_data/topics.py"])
def test_another_standard_library_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {}")
    (tmp_path / "a.py").write_text("pass")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    before = open_source(DataConfig("python_docs", seq_len=8)).fingerprint()
    assert open_source(DataConfig("python_docs", seq_len=8)).fingerprint() == before
    (tmp_path / changed).write_text("a longer text")
    assert open_source(DataConfig("python_docs", seq_len=8)).fingerprint() != before


def test_no_standard_library_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        open_source(DataConfig("python_docs", seq_len=8))
    expected = f"data.source=python_docs finds no standard library source under {tmp_path}: use data=text data.path=FOLDER"
    assert str(caught.value) == expected
