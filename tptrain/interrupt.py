"""The signals that ask a command to stop: the first is heeded, the second ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from tptrain import failures
from tptrain.stop import FirstAndSecond, Stopped, numbers


@contextlib.contextmanager
def signals_stop(
    heard: Callable[[signal.Signals], bool] | None = None,
    given_up: Callable[[signal.Signals], None] | None = None,
    echo_seconds: float = 0.3,
    also: Iterable[signal.Signals] = (),
) -> Iterator[None]:
    """In the block the first signal that asks to stop raises Stopped, unless `heard` takes care of it; the second ends the process.

    heard: says whether it did. given_up: called before the process ends. echo_seconds: what comes so soon after the first signal is that
    one again. Ranks that are still there then die with the process (`ranks.die_with_parent`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = FirstAndSecond(echo_seconds)

    def stop(number: int, frame: FrameType | None) -> None:
        count = seen.count()
        if count == 0:
            return
        if count > 1:
            failures.show_cursor()
            if given_up is not None:
                given_up(signal.Signals(number))
            os._exit(1)
        if heard is None or not heard(signal.Signals(number)):
            raise Stopped(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in (*numbers(), *also)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_at_most(seconds: float) -> None:
    """Raise Stopped in the main thread after so long, which ends ranks that are still there; the end of `signals_stop` calls it off."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped, but the ranks did not end within launch.stop_seconds={seconds:g}")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
