"""How far a long save has come, said in the log now and then."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

LOGGER = logging.getLogger("tptrain")


@contextlib.contextmanager
def told_in_the_log(folder: Path, total_bytes: int, every_seconds: float = 10.0) -> Iterator[None]:
    """While the block runs, log how many of so many bytes the files of `folder` have, those of all ranks that see the same disk."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(every_seconds):
            with contextlib.suppress(OSError):
                written = sum(path.stat().st_size for path in folder.iterdir())
                LOGGER.info(f"{folder.name}: {written:,} of {total_bytes:,} bytes are written, {100 * written / total_bytes:.0f} %")

    thread = threading.Thread(target=tell, name="checkpoint progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
