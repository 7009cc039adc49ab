"""One holder at a time, though each removes the lock's file; flock is of an open file, so threads show it as processes do."""

import fcntl
import threading
import time
from pathlib import Path

import pytest

from tptrain.data.lock import locked


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    inside, most, taken = 0, 0, 0

    def take() -> None:
        nonlocal inside, most, taken
        for _ in range(40):
            with locked(tmp_path / "lock", lambda: None) as alone:
                assert alone
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                taken += 1
                inside -= 1

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, taken) == (1, 240)
    assert list(tmp_path.iterdir()) == []


def test_waiting_is_said_once_and_a_file_that_was_left_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    waits: list[str] = []
    with locked(tmp_path / "lock", lambda: waits.append("first")):
        second = threading.Thread(target=lambda: locked(tmp_path / "lock", lambda: waits.append("second")).__enter__())
        second.daemon = True
        second.start()
        time.sleep(0.2)
        assert waits == ["second"]
    second.join(10)
    assert not second.is_alive()


def test_without_locks_it_says_that_it_is_not_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "lock", lambda: None) as alone:
        assert not alone
