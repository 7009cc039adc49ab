"""Memory that this process has freed stays with it.

glibc gives freed memory back to the system, and a training step asks for the same memory again: each 4 KiB of it is then a page
fault and a page to be zeroed. On a CPU this is a tenth of a step. A step needs what the step before it needed, so nothing is gained
by giving it back.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), from glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
_ARENA_LIMIT = 32 * 2**20
"""The largest block that mallopt lets threads other than the first take from their arenas."""


def keep_freed_memory() -> bool:
    """Have malloc take all memory from the heap and keep what is freed; whether this C library can."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # another C library, whose mallopt does nothing
        return False
    settings = ((_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _ARENA_LIMIT), (_M_MMAP_MAX, 0))
    done = [library.mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(done)
