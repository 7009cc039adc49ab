"""Builders that are killed, that start together, and that have no room: a store is whole or absent."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.data.builder import Builders
from tests.data.row_source import RowSource, build
from tests.data.test_build_store import workers_of
from tptrain.data.store import StoreError, TokenStore

ROWS = 4000
TEXTS = [f"row {number} " * (number % 40) for number in range(ROWS)]


@pytest.fixture(scope="module")
def builders() -> Iterator[Builders]:
    with Builders() as process:
        yield process


@contextmanager
def memory() -> Iterator[Path]:
    """A folder in memory, if there is one: killing needs no disk, and fsync on a busy one takes long."""
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def place() -> Iterator[Path]:
    with memory() as folder:
        yield folder


@pytest.fixture(scope="module")
def whole(builders: Builders) -> tuple[str, dict[str, bytes], float]:
    """The name and the files of a store that nobody disturbed, and the seconds that it took."""
    seconds = []
    with memory() as stores:
        for _ in range(3):
            started = time.perf_counter()
            builders.start(stores=str(stores), rows=ROWS, num_proc=1)
            assert builders.end()[0] == 0
            seconds.append(time.perf_counter() - started)
            (folder,) = stores.iterdir()
            files, texts = contents(folder), stored(folder)
            shutil.rmtree(folder)
    assert sorted(texts) == sorted(TEXTS)
    return folder.name, files, min(seconds)


def kill(builder: int) -> None:
    """It may be gone."""
    with suppress(ProcessLookupError):
        os.kill(builder, signal.SIGKILL)


def stored(folder: Path) -> list[str]:
    """The text of every document of a store."""
    store = TokenStore.open(folder)
    return [bytes(split.document(i)[:-1].tolist()).decode() for split in (store.train, store.val) for i in range(split.num_documents)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json" and not path.name.startswith(".")}


def check(stores: Path, whole: tuple[str, dict[str, bytes], float]) -> bool:
    """Nothing but hidden things and the store is there, and every id that can be read from that is right; whether it is whole."""
    name, files, _ = whole
    for path in stores.iterdir() if stores.exists() else ():
        assert path.name == name or path.name.startswith((f".building-{name}-", f".{name}.lock"))
    if not (stores / name).exists():
        return False
    store = TokenStore.open(stores / name)
    for split in ("train", "val"):
        expected = b"".join(files[file] for file in sorted(files) if file.startswith(f"{split}-") and file.endswith(".tokens"))
        try:
            assert getattr(store, split).tokens[:].tobytes() == expected
        except StoreError:
            (stores / name / "damaged").unlink()  # the reader's mark, which the next builder must not need
            return False
    return True


def build_again(builders: Builders, stores: Path, whole: tuple[str, dict[str, bytes], float]) -> None:
    """What the next builder makes of it: one whole store, and nothing beside it."""
    builders.start(stores=str(stores), rows=ROWS, num_proc=1)
    assert builders.end()[0] == 0
    assert [path.name for path in stores.iterdir()] == [whole[0]]
    assert contents(stores / whole[0]) == whole[1]


def damage(folder: Path) -> None:
    """So that the next builder repairs."""
    os.truncate(folder / "train-00001.tokens", 1000)
    (folder / "val-00004.tokens").unlink()


# ---- killed ----------------------------------------------------------------------------------------------


def test_killed_at_50_random_moments(place: Path, builders: Builders, whole: tuple[str, dict[str, bytes], float]) -> None:
    """34 while building, 10 while repairing, 6 while several processes build; then the next builder ends it.

    How long to wait follows from how the waits before ended, so that most fall within the work however busy the machine is.
    """
    moments, outcomes = random.Random(), {"killed": 0, "whole": 0}
    longest = {True: 2.0, False: whole[2]}
    for turn in range(50):
        stores = place / str(turn)
        several = turn >= 44
        if 34 <= turn < 44:
            build_again(builders, stores, whole)
            damage(stores / whole[0])
        builder = builders.start(stores=str(stores), rows=ROWS, num_proc=2 if several else 1)
        time.sleep(moments.uniform(0, longest[several]))
        kill(builder)
        killed = builders.end()[0] == -signal.SIGKILL
        longest[several] *= 1.1 if killed else 0.75
        outcomes["killed"] += killed
        outcomes["whole"] += check(stores, whole)
        if several:
            deadline = time.monotonic() + 10
            while workers_of(builder):
                assert time.monotonic() < deadline, "workers outlive the builder"
                time.sleep(0.02)
        if turn % 3 == 0 or turn >= 34:
            build_again(builders, stores, whole)
    assert outcomes["killed"] >= 20, outcomes
    assert outcomes["whole"] < 45, outcomes


@pytest.mark.parametrize("repairs", [False, True])
def test_killed_before_each_step_that_reaches_the_disk(
    place: Path, builders: Builders, whole: tuple[str, dict[str, bytes], float], repairs: bool
) -> None:
    """Die before the 1st, 2nd, ... mkdir, fsync, rename, replace or unlink; and the next builder finishes it."""
    killed = readable = 0
    for fatal in range(1, 400, 3 if not repairs else 1):
        stores = place / str(fatal)
        if repairs:
            build_again(builders, stores, whole)
            damage(stores / whole[0])
        builders.start(stores=str(stores), rows=ROWS, num_proc=1, fatal=fatal)
        code, _ = builders.end()
        readable += check(stores, whole)
        build_again(builders, stores, whole)
        shutil.rmtree(stores)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert code == 0, "all steps were tried"
    assert killed >= 10
    assert 0 < readable < killed, "it dies before the store is whole, and after"


# ---- two at once -----------------------------------------------------------------------------------------


def test_two_builders_build_once(place: Path, builders: Builders, whole: tuple[str, dict[str, bytes], float]) -> None:
    with Builders() as others:
        others.start(stores=str(place / "warm"), rows=10, num_proc=1)
        others.end()
        for turn in range(8):
            stores = place / str(turn)
            builders.start(stores=str(stores), rows=ROWS, num_proc=1)
            time.sleep(turn % 4 * 0.02)
            others.start(stores=str(stores), rows=ROWS, num_proc=1)
            ended = [builders.end(), others.end()]
            assert [code for code, _ in ended] == [0, 0]
            said = [line for _, lines in ended for line in lines]
            assert sum(line.startswith("tokenising") for line in said) == 1, "it is built once"
            assert sum(" tokens in " in line and "->" in line for line in said) == 1
            assert [lines[-1] for _, lines in ended] == [str(stores / whole[0])] * 2
            assert [path.name for path in stores.iterdir()] == [whole[0]]
            assert contents(stores / whole[0]) == whole[1]


def test_the_second_says_that_it_waits_and_a_dead_builder_s_lock_holds_nobody(
    place: Path, builders: Builders, whole: tuple[str, dict[str, bytes], float]
) -> None:
    lines: list[str] = []
    builder = builders.start(stores=str(place), rows=ROWS, num_proc=1)
    while not list(place.glob(".building-*")):
        time.sleep(0.001)
    os.kill(builder, signal.SIGSTOP)  # in the middle
    assert list(place.glob(".*.lock"))
    with Builders() as others:
        others.start(stores=str(place), rows=ROWS, num_proc=1)
        time.sleep(1.0)
        assert not (place / whole[0]).exists()
        assert len(list(place.glob(".building-*"))) == 1, "the second touches nothing"
        os.kill(builder, signal.SIGKILL)
        assert builders.end()[0] == -signal.SIGKILL
        code, lines = others.end()
    assert code == 0
    assert lines[0] == f"waiting for another process that builds {place / whole[0]}"
    assert lines[1] == f"tokenising rows: {ROWS} documents"
    assert [path.name for path in place.iterdir()] == [whole[0]]
    assert contents(place / whole[0]) == whole[1]


# ---- a full disk -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("megabytes", "num_proc", "where"),
    [(0.2, 1, "cache"), (0.9, 1, "store/train-"), (0.9, 2, "store/"), (1.6, 1, "store/train-"), (2.1, 1, "store/")],
)
def test_a_full_disk_is_one_line_and_nothing_is_left(
    small_disk: Path, builders: Builders, megabytes: float, num_proc: int, where: str
) -> None:
    text_bytes = sum(map(len, TEXTS))
    assert 0.6e6 < text_bytes < 0.7e6
    subprocess.run(["mount", "-o", f"remount,size={int(megabytes * 1e6) // 4096 * 4096}", str(small_disk)], check=True)
    builders.start(stores=str(small_disk), rows=ROWS, num_proc=num_proc)
    code, lines = builders.end()
    assert code == 2, lines
    assert lines[-1].startswith(f"data.store_dir={small_disk} has no room for the token store, whose {small_disk}/.building-jsonl-")
    assert where in lines[-1]
    assert " MB were free, and its " in lines[-1]
    assert lines[-1].endswith("): free some of that disk, or use data.store_dir=FOLDER on a larger one")
    if where != "cache":
        needed = float(lines[-1].split("need about ")[1].split(" MB")[0])
        assert needed == pytest.approx(2 * (text_bytes + ROWS) / 1e6, rel=0.2)
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    builders.start(stores=str(small_disk), rows=ROWS, num_proc=num_proc)
    assert builders.end()[0] == 0


def test_a_full_disk_during_a_repair(small_disk: Path, builders: Builders) -> None:
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    folder = build(RowSource(list(TEXTS)), small_disk)
    before = contents(folder)
    os.truncate(folder / "train-00000.tokens", 10)
    with open(small_disk / "filler", "wb") as file:
        file.write(bytes(16 * 2**20 - 1_500_000 - 600_000))
    builders.start(stores=str(small_disk), rows=ROWS, num_proc=1)
    code, lines = builders.end()
    assert code == 2, lines
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", folder.name]
    with pytest.raises(StoreError, match="train-00000"):
        TokenStore.open(folder).train.tokens[:1]
    (small_disk / "filler").unlink()
    build(RowSource(list(TEXTS)), small_disk)
    assert contents(folder) == before
