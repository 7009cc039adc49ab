"""A process that must not outlive the one that started it."""

from __future__ import annotations

import os
import signal
import sys


def die_with_parent(started_by: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies (Linux), also when the parent is killed and can tell nobody.

    started_by: the parent's process id, where it is known: this process ends at once if the parent has died already.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != (started_by or parent):  # it died before we asked
        os._exit(1)
