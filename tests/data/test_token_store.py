"""A store is whole or absent, whenever its builder dies and however many builders there are."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tptrain.config import Config
from tptrain.data import Split, StoreError, TokenStore, prepare
from tptrain.data.memorize import random_tokens
from tptrain.data.store import StoreWriter


def writer(folder: Path, vocab_size: int = 257) -> StoreWriter:
    return StoreWriter(folder, "f" * 64, "text", tokenizer="byte", vocab_size=vocab_size, end_of_document=256)


# ---- writing and opening ---------------------------------------------------------------------------------


def test_documents_come_back(tmp_path: Path, documents: Callable[[Split], list[list[int]]]) -> None:
    with writer(tmp_path / "store") as building:
        for split, ids in (("train", [1, 2, 256]), ("val", [256]), ("train", []), ("train", [3, 256])):
            building.append(split, np.array(ids, dtype=np.int64))
        store = building.finish()
    assert store.folder == tmp_path / "store"
    assert documents(store.train) == [[1, 2, 256], [], [3, 256]]
    assert documents(store.val) == [[256]]
    assert (store.train.num_tokens, store.train.num_documents, store.val.num_tokens) == (5, 3, 1)
    assert not store.train.tokens.flags.writeable
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store.train.document(index)


@pytest.mark.parametrize("ids", [[257], [-1], [0, 70000]])
def test_an_id_beyond_the_vocabulary_is_an_error_not_another_id(tmp_path: Path, ids: list[int]) -> None:
    with writer(tmp_path / "store") as building, pytest.raises(ValueError, match="range\\(257\\)"):
        building.append("train", np.array(ids))


def test_an_unfinished_store_is_cleared_up(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writer(tmp_path / "store") as building:
            building.append("train", np.array([1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_store_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no token store"):
        TokenStore.open(tmp_path / "missing")
    (tmp_path / "meta.json").write_text('{"format": 999}')
    with pytest.raises(StoreError, match="format 999"):
        TokenStore.open(tmp_path)


def test_the_other_builder_s_store_is_used(tmp_path: Path) -> None:
    with writer(tmp_path / "store") as first, writer(tmp_path / "store") as second:
        first.append("train", np.array([1, 256]))
        second.append("train", np.array([1, 256]))
        one = first.finish()
        other = second.finish()
    assert one.folder == other.folder == tmp_path / "store"
    assert one.train.tokens.tolist() == other.train.tokens.tolist() == [1, 256]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# ---- killed builders -------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from tptrain.data.store import StoreWriter
folder, fatal = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def fatal_at_last(call):
    def counted(*arguments, **keywords):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)
    return counted
for name in ("mkdir", "fsync", "rename"):
    setattr(os, name, fatal_at_last(getattr(os, name)))
with StoreWriter(folder, "f" * 64, "text", tokenizer="byte", vocab_size=257, end_of_document=256) as writer:
    writer.append("train", np.arange(200))
    writer.append("val", np.arange(100))
    writer.finish()
"""


def assert_right_or_no_store(folder: Path, train: list[int], val: list[int]) -> bool:
    """Whether it opened; if so, it must be whole."""
    try:
        store = TokenStore.open(folder)
    except StoreError:
        return False
    assert store.train.tokens.tolist() == train
    assert store.val.tokens.tolist() == val
    assert store.train.offsets.tolist() == [0, len(train)]
    return True


def test_killed_before_each_step_that_reaches_the_disk(tmp_path: Path) -> None:
    """Die before the 1st, 2nd, ... mkdir, fsync or rename: the store is absent, or whole, and can be built afterwards."""
    train, val = list(range(200)), list(range(100))
    outcomes = []
    for fatal in range(1, 50):
        folder = tmp_path / str(fatal) / "store"
        folder.parent.mkdir()
        code = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(fatal)], timeout=60).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        for path in folder.parent.iterdir():
            opened = assert_right_or_no_store(path, train, val)
            assert opened or path.name.startswith(".building-")  # never a damaged store under the final name
        outcomes.append(folder.exists())
        with writer(folder) as building:  # beside what the dead one left
            building.append("train", np.array(train))
            building.append("val", np.array(val))
            building.finish()
        assert assert_right_or_no_store(folder, train, val)
    # mkdir, then fsync of five files and their folder: absent; then rename: absent before it; then one more fsync: there
    assert outcomes == [False] * 8 + [True]


KILLED_ANY_TIME = """
import sys
from types import SimpleNamespace
from tptrain.config import DataConfig
from tptrain.data import prepare
data = DataConfig("memorize", seq_len=1000, num_sequences=3000, vocab_size=70000, store_dir=sys.argv[1])
config = SimpleNamespace(data=data, model=SimpleNamespace(vocab_size=70000), train=SimpleNamespace(eval_steps=1))
print("ready", flush=True)
sys.stdin.readline()
print(prepare(config, lambda line: None))
"""


def start(stores: Path) -> subprocess.Popen[str]:
    """A builder that waits for a line on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_ANY_TIME, str(stores)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_killed_at_any_moment(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    stores, moments = tmp_path / "stores", random.Random()
    expected = random_tokens(3000 * 1000 + 1, 70000)
    for _ in range(6):
        process = start(stores)
        go(process)
        time.sleep(moments.uniform(0, 0.12))
        process.kill()
        process.communicate()
        for path in stores.glob("*"):
            try:
                store = TokenStore.open(path)
            except StoreError:
                assert path.name.startswith(".building-")
            else:
                assert np.array_equal(store.train.tokens, expected)
                assert np.array_equal(store.val.tokens, expected)
    config = make_config("memorize", seq_len=1000, num_sequences=3000, vocab_size=70000, model_vocab_size=70000)
    store = TokenStore.open(prepare(config, lambda line: None))
    assert store.folder.parent == stores
    assert np.array_equal(store.train.tokens, expected)


def test_builders_that_start_together_end_with_one_store(tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    processes = [start(stores) for _ in range(3)]
    for process in processes:
        go(process)
    printed = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    (folder,) = stores.iterdir()  # one store, and no building folder left
    assert printed == [str(folder)] * 3
    assert np.array_equal(TokenStore.open(folder).train.tokens, random_tokens(3000 * 1000 + 1, 70000))
