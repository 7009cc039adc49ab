"""What a signal means to a process of a job: end at once, or finish the step first.

    before the training loop   nothing is lost: the process ends at once
    in the loop                the first signal is a wish, which the ranks agree on at a step's end; the second ends the process

A signal is often delivered twice, by a terminal or a launcher to a whole group and again by the parent. What comes within a moment of
the first is that first one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

AGAIN = 75
"""Exit code of a training that was stopped: start the same command again, and it goes on (EX_TEMPFAIL of <sysexits.h>)."""

ON_BEHALF = {signal.SIGTERM: signal.SIGUSR2}
"""What our launcher sends to its ranks for a signal that it got itself; the others travel as they are. A SIGTERM of the launcher's own
means that the job has failed, and that a rank has to end at once."""


class Stopped(KeyboardInterrupt):
    """The job was asked to stop, and did. The message says by what, and what was saved."""

    exit_code = 1

    @property
    def out_of_time(self) -> bool:
        """Whether train.max_minutes was the reason, and nobody asked."""
        return str(self).startswith("stopped by train.max_minutes")


def numbers() -> list[signal.Signals]:
    """The signals that ask a job to stop; not SIGHUP where it is ignored (nohup)."""
    heard = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    return heard if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*heard, signal.SIGHUP]


@dataclass
class Wish:
    """Whether somebody asked this process to stop its training."""

    reason: str | None = None
    """The signal's name, once there was one."""
    listening: bool = False
    """Whether the training looks at this wish."""
    announce: Callable[[], None] | None = None
    """Called when it begins to."""

    def listen(self) -> None:
        """From now on the training looks here at each step's end."""
        self.listening = True
        if self.announce is not None:
            self.announce()

    def ask(self, reason: str) -> bool:
        """Ask. False where nobody listens yet."""
        if self.listening and self.reason is None:
            self.reason = reason
        return self.listening


class FirstAndSecond:
    """Tells a second signal from the echo of the first. echo_seconds: what comes so soon after the first is the first."""

    def __init__(self, echo_seconds: float) -> None:
        self._echo_seconds = echo_seconds
        self._first: float | None = None

    def count(self) -> int:
        """1 for the first signal, 0 for an echo of it, 2 for each later one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return 1
        return 0 if now - self._first < self._echo_seconds else 2


def follow_launcher(wish: Wish, launcher: int) -> None:
    """In a rank that process `launcher` started: a thread receives the signals, also while the rank waits in a collective and runs no
    Python. To be called before any other thread begins, as these inherit what is blocked.

    The wish is set once the training listens. Before that, and for a SIGTERM from the launcher, the rank dies by the signal.
    """
    heard = [*numbers(), *ON_BEHALF.values()]
    for number in heard:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    threading.Thread(target=_follow, args=(wish, launcher, heard), name="signals", daemon=True).start()


def _follow(wish: Wish, launcher: int, heard: list[signal.Signals]) -> None:
    meant = {sent: got for got, sent in ON_BEHALF.items()}
    while True:
        number, sender = _receive(heard, launcher)
        failed = number == signal.SIGTERM and sender == launcher
        if failed or not wish.ask(meant.get(number, number).name):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
            os.kill(os.getpid(), number)


def _receive(heard: list[signal.Signals], launcher: int) -> tuple[signal.Signals, int]:
    """The next signal and who sent it; where the system does not say who (macOS), the launcher."""
    if hasattr(signal, "sigwaitinfo"):
        found = signal.sigwaitinfo(heard)
        return signal.Signals(found.si_signo), found.si_pid
    return signal.Signals(signal.sigwait(heard)), launcher
