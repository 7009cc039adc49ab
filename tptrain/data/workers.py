"""Processes that tokenise: each gets the work once, then ranges, and sends back what it wrote.

They are started anew, not forked, as a fork of a process with threads may hang. They are out of reach of the terminal's
signals and die with the builder, however that ends.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any

from tptrain.config_error import ConfigError, refuse
from tptrain.data.meta import Shard
from tptrain.data.shards import Progress, Range, Work, write_range
from tptrain.lifeline import die_with_parent

_ENTRY = "import json, sys; sys.path[:] = json.loads(sys.argv[3]); from tptrain.data.workers import main; main()"


class Workers:
    """`count` processes. As a context manager, kills them at the end; their files that are not finished are then of no use."""

    def __init__(self, work: Work, count: int) -> None:
        self._count = count
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        try:
            for _ in range(count):
                self._start()
            payload = pickle.dumps(work)
            for connection in self._processes:
                self._send(connection, payload)
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kill()

    def write(self, ranges: Sequence[Range], progress: Progress) -> Iterator[tuple[Range, dict[str, Shard]]]:
        """Write all ranges; each as it is done. Raises as `write_range` does, and ConfigError where a process is killed."""
        left, running = list(reversed(ranges)), dict[Connection, Range]()
        for connection in list(self._processes)[: len(left)]:
            running[connection] = left.pop()
            self._send(connection, pickle.dumps(running[connection]))
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                kind, *values = self._receive(ready)
                if kind == "progress":
                    progress(*values)
                    continue
                if kind != "written":
                    raise _error(kind, values)
                yield running.pop(ready), values[0]
                if left:
                    running[ready] = left.pop()
                    self._send(ready, pickle.dumps(running[ready]))

    def _start(self) -> None:
        ours, theirs = Pipe()
        number = theirs.fileno()
        command = [sys.executable, "-c", _ENTRY, str(number), str(os.getpid()), json.dumps(sys.path)]
        with theirs:
            self._processes[ours] = subprocess.Popen(command, pass_fds=(number,), stdin=subprocess.DEVNULL, process_group=0)

    def _send(self, connection: Connection, data: bytes) -> None:
        try:
            connection.send_bytes(data)
        except OSError:
            raise self._died(connection) from None

    def _receive(self, connection: Connection) -> tuple[Any, ...]:
        try:
            return connection.recv()
        except (EOFError, OSError):
            raise self._died(connection) from None

    def _died(self, connection: Connection) -> ConfigError:
        code = self._processes[connection].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return refuse("data.num_proc", self._count, f"was too much: a process that tokenised {how}", "use a smaller data.num_proc")

    def _kill(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.wait()


def _error(kind: str, values: list[Any]) -> Exception:
    if kind == "refused":
        return ConfigError(*values)
    return OSError(*values) if kind == "system" else RuntimeError(f"a process that tokenised failed:\n{values[0]}")


# ---- the worker's side -----------------------------------------------------------------------------------


def main() -> None:
    """Entry of a worker: its arguments are a pipe's file descriptor and the builder's process id."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(int(sys.argv[2]))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
    with Connection(int(sys.argv[1])) as builder:
        try:
            _serve(builder)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # where the kernel does not kill us: the builder is gone
        except ConfigError as error:
            builder.send(("refused", str(error)))
        except OSError as error:
            builder.send(("system", error.errno, error.strerror or str(error), error.filename))
        except Exception:
            builder.send(("failed", traceback.format_exc()))


def _serve(builder: Connection) -> None:
    work: Work = pickle.loads(builder.recv_bytes())

    def progress(text_bytes: int, stored_bytes: int) -> None:
        builder.send(("progress", text_bytes, stored_bytes))

    while True:
        part: Range = pickle.loads(builder.recv_bytes())
        builder.send(("written", write_range(work, part, progress)))
