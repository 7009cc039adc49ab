"""Who is missing after a time limit, on stores in memory."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from tptrain import failures, roll_call


class GoneStore:
    """A store whose host is gone."""

    def __getattr__(self, name):
        def fail(*_):
            raise RuntimeError("Connection reset by peer")

        return fail


def test_the_silent_ranks_are_named() -> None:
    store = HashStore()
    roll_call.fall(store, 0)
    roll_call.fall(store, 2)
    assert roll_call.missing(store, 4, patience_seconds=0.2) == [1, 3]


def test_ranks_that_fall_a_little_later_are_waited_for() -> None:
    store = HashStore()
    roll_call.fall(store, 0)
    threading.Timer(0.3, roll_call.fall, (store, 1)).start()
    began = time.monotonic()
    assert roll_call.missing(store, 2, patience_seconds=20) == []
    assert time.monotonic() - began < 10, "it does not wait longer than it must"


def test_a_rank_that_is_known_to_be_missing_is_not_waited_for() -> None:
    store = HashStore()
    roll_call.fall(store, 0)
    roll_call.fall(store, 1)
    began = time.monotonic()
    assert roll_call.missing(store, 3, patience_seconds=20, known=(2,)) == [2]
    assert time.monotonic() - began < 10


def test_ranks_wait_for_the_last_to_start() -> None:
    store = HashStore()
    threads = [threading.Timer(0.1 * rank, roll_call.arrive, (store, rank, 3, 20)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(RuntimeError, match=r"timed out: ranks 3, 4 did not start within 0\.2 s") as caught:
        roll_call.arrive(store, 0, 5, 0.2)
    assert failures.kind_of(caught.value) == "lost_peer", "another rank's failure, not this one's"


def test_a_store_that_is_gone_names_nobody() -> None:
    roll_call.fall(GoneStore(), 0)
    assert roll_call.missing(GoneStore(), 2, patience_seconds=20) == []
