"""Reading ahead changes nothing but the time: the rows, the errors, and the end."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from subprocess import run

import numpy as np
import pytest

from tptrain.data import Prefetch


class Source:
    """Row g holds g; notes what is read by which thread. `gate`: what each reading waits for."""

    samples_per_epoch = 1000

    def __init__(self, fails_at: int | None = None) -> None:
        self.reads: list[tuple[int, int]] = []
        self.threads: set[str] = set()
        self.fails_at = fails_at
        self.gate = threading.Event()
        self.gate.set()

    def rows(self, first: int, count: int) -> np.ndarray:
        self.gate.wait()
        self.reads.append((first, count))
        self.threads.add(threading.current_thread().name)
        if self.fails_at is not None and first <= self.fails_at < first + count:
            raise OSError(f"sample {self.fails_at} is gone")
        return np.arange(first, first + count).reshape(-1, 1)


def until(holds: object) -> None:
    """Wait for what another thread does, 10 seconds at most."""
    assert callable(holds)
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_each_request_gets_its_own_rows() -> None:
    source = Source()
    reader = Prefetch(source, 8)
    for first in range(0, 160, 8):
        assert reader.rows(first + 2, 3)[:, 0].tolist() == [first + 2, first + 3, first + 4]
    assert source.reads[:20] == [(first + 2, 3) for first in range(0, 160, 8)], "each once"
    assert source.threads == {"prefetch"}
    assert reader.samples_per_epoch == 1000
    reader.close()


def test_it_reads_ahead_but_not_without_end() -> None:
    source = Source()
    reader = Prefetch(source, 8)
    assert not source.reads, "not before it is asked"
    reader.begin(0, 8)
    until(lambda: len(source.reads) == 4)
    time.sleep(0.05)
    assert source.reads == [(0, 8), (8, 8), (16, 8), (24, 8)]
    reader.rows(0, 8)
    until(lambda: len(source.reads) == 5)
    time.sleep(0.05)
    assert source.reads[4:] == [(32, 8)]
    reader.close()


@pytest.mark.parametrize("wait", [0.0, 0.01], ids=["in mid-reading", "with batches read"])
def test_a_jump_throws_away_what_was_read(wait: float) -> None:
    reader = Prefetch(Source(), 8)
    for round_ in range(50):
        for first, count in ((0, 4), (8, 4), (500 + round_, 4), (508 + round_, 4), (516 + round_, 2), (516 + round_, 2)):
            assert reader.rows(first, count)[:, 0].tolist() == list(range(first, first + count))
            if round_ < 3:
                time.sleep(wait)
    reader.close()


def test_a_reading_begun_before_a_jump_is_not_taken_for_what_is_due() -> None:
    source = Source()
    source.gate.clear()
    reader = Prefetch(source, 8)
    reader.begin(0, 8)
    time.sleep(0.02)  # the thread waits at the gate, for samples 0..7
    reader.begin(400, 8)
    source.gate.set()
    assert reader.rows(400, 8)[0] == 400
    reader.close()


def test_an_error_comes_with_the_request_that_it_is_about() -> None:
    source = Source(fails_at=20)
    reader = Prefetch(source, 8)
    reader.begin(0, 8)
    until(lambda: len(source.reads) == 3)
    assert reader.rows(0, 8)[0] == 0
    assert reader.rows(8, 8)[0] == 8
    with pytest.raises(OSError, match="sample 20 is gone"):
        reader.rows(16, 8)
    assert source.reads == [(0, 8), (8, 8), (16, 8)], "nothing is read behind it"
    source.fails_at = None
    assert reader.rows(16, 8)[0] == 16, "asked once more, it is read once more"
    reader.close()


def test_the_wait_is_measured() -> None:
    source = Source()
    reader = Prefetch(source, 8)
    assert reader.take_wait_seconds() == 0
    source.gate.clear()
    threading.Timer(0.2, source.gate.set).start()
    reader.rows(0, 8)
    until(lambda: len(source.reads) == 5)
    reader.rows(8, 8)
    assert 0.09 < reader.take_wait_seconds() < 0.15, "the mean of 0.2 and 0 seconds"
    assert reader.take_wait_seconds() == 0
    reader.rows(16, 8)
    assert reader.take_wait_seconds() < 0.05
    reader.close()


def test_close_ends_the_thread() -> None:
    reader = Prefetch(Source(), 8)
    reader.rows(0, 8)
    assert reader._thread is not None
    reader.close()
    reader.close()
    assert not reader._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        reader.rows(8, 8)


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    code = (
        "import time, numpy as np\nfrom tptrain.data import Prefetch\n"
        "class Slow:\n    samples_per_epoch = None\n    def rows(self, first, count): time.sleep(60)\n"
        "reader = Prefetch(Slow(), 8)\nreader.begin(0, 8)\ntime.sleep(0.3)\nreader.close()\n"
    )
    began = time.monotonic()
    assert run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=30, check=False).returncode == 0
    assert 1 < time.monotonic() - began < 20, "after a moment's wait for it"
