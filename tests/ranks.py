"""Starts ranks for a test: `run_ranks(4, function, args)` calls `function(rank, *args)` in four processes joined by gloo.

Processes fork from a clean server that has torch loaded, so a start costs a fraction of a second. Functions must be
importable (defined at the top of a test module) and return no torch tensors (they would die with their rank). A rank's
exception is raised here with its traceback.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "tptrain.train", "hydra"]
)
"""DTensor imports torch._dynamo when it is first used, which takes longer than most tests."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Each rank's return value, by rank. Raises AssertionError with the first failed rank's traceback."""
    with started_ranks(world, function, *args) as (_, receivers):
        return _collect(receivers, time.monotonic() + timeout)


@contextlib.contextmanager
def started_ranks(world: int, function: Callable[..., Any], *args: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """The processes of ranks, and by rank what receives (traceback or None, value) at its end. They are killed when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        receivers, processes = [], []
        for rank in range(world):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(target=_main, args=(rank, world, folder, sender, function, args), daemon=True)
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            yield processes, receivers
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures = []
    while len(results) + len(failures) < len(receivers):
        ready = multiprocessing.connection.wait(
            [r for i, r in enumerate(receivers) if i not in results], timeout=deadline - time.monotonic()
        )
        assert ready, f"ranks {[i for i in range(len(receivers)) if i not in results]} did not finish in time"
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                error, value = receiver.recv()
            except EOFError:
                error, value = f"rank {rank} died", None
            if error:
                failures.append((rank, error))
            results[rank] = value
        if failures:
            time.sleep(0.1)
            raise AssertionError(f"rank {failures[0][0]} failed:\n{failures[0][1]}")
    return [results[rank] for rank in range(len(receivers))]


def _main(rank: int, world: int, folder: str, sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # full_tensor() is slow, which is fine here
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    error, value = None, None
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        value = function(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    sender.send((error, value))
    sender.close()
    os._exit(0)
