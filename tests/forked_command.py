"""Runs the whole command `tptrain` in processes that fork from the server of `tests/ranks.py`, which has torch loaded.

As `tests/command.py` does, for a third of its time: one process, or several ranks that somebody else has started (RANK and WORLD_SIZE are
set, as by srun). What `tests/moments` plants happens here too.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tests.command import Outcome
from tests.ranks import _context

MOMENTS = Path(__file__).parent / "moments"


def forked(folder: Path, *arguments: str, ranks: int = 0, timeout: float = 400, **variables: str) -> Outcome:
    """Run the command in `folder` to its end, in one process of its own or as so many ranks. All ranks must leave with the same code."""
    began, place = time.monotonic(), {}
    if ranks:
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    processes = []
    for rank in range(max(ranks, 1)):
        own = {**variables, **place, **({"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} if ranks else {})}
        processes.append(_context.Process(target=_main, args=(str(folder), arguments, own, rank), daemon=True))
        processes[-1].start()
    try:
        for process in processes:
            process.join(max(0.0, began + timeout - time.monotonic()))
        codes = [process.exitcode for process in processes]
        assert len({*codes}) == 1, codes
        assert codes[0] is not None, "it did not end in time"
    finally:
        for process in processes:
            process.kill()
            process.join()
    out, err = ((folder / f"rank-0.{name}").read_text() for name in ("out", "err"))
    return Outcome(codes[0], out, err, time.monotonic() - began)


def _main(folder: str, arguments: tuple[str, ...], variables: dict[str, str], rank: int) -> Any:
    os.chdir(folder)
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"rank-{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["tptrain", *arguments]
    runpy.run_path(str(MOMENTS / "sitecustomize.py"))
    from tptrain.cli import main

    main()
