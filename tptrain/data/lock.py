"""A lock that a dead process cannot hold: flock on a file, which the kernel releases when its holder ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path, waits: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock `path` in the block, and remove its file at the end; True, or False where the file system has no locks.

    waits: called once where another process holds it, before waiting for that one. Raises OSError where the file cannot be made.
    """
    descriptor = _take(path, waits)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path, waits: Callable[[], None]) -> int | None:
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    waits()
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # some network file systems have none
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            return None
        except BaseException:  # stopped while waiting
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # the holder before removed the file: whoever comes next makes a new one, so take that


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
