"""A process that builds stores in children of its own: `datasets` is imported once, and each start costs milliseconds.

Reads jobs as lines of JSON from standard input. For each it forks, prints the child's process id, and when the child has
ended its wait status and what it reported. A job: stores, rows, known_as, num_proc, and `fatal`: die before the how-many-th
call that reaches the disk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("mkdir", "fsync", "rename", "replace", "unlink")


class Builders:
    """Such a process, from the test's side. As a context manager, ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.data.builder"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> Builders:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, **job: Any) -> int:
        """Start a builder; its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        return int(self._line())

    def end(self) -> tuple[int, list[str]]:
        """Wait for it: the exit code (-9: killed), and what it said."""
        code, said = json.loads(self._line())
        return code, said

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def die_at(fatal: int) -> None:
    """Replace what reaches the disk so that the fatal-th call is the last."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return count

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def build(stores: str, num_proc: Any, rows: int, said: int, fatal: int | None = None, text: str = "row {number} ") -> None:
    from tests.data import row_source

    texts: list[str | None] = [text.format(number=number) * (number % 40) for number in range(rows)]
    if fatal is not None:
        die_at(fatal)

    def report(line: str) -> None:
        os.write(said, f"{line}\n".encode())

    folder = row_source.build(row_source.RowSource(texts), Path(stores), num_proc, report=report)
    report(str(folder))


def main() -> None:
    import datasets  # noqa: F401
    import pyarrow.compute  # noqa: F401
    import rich.progress  # noqa: F401

    import tests.data.row_source  # noqa: F401
    from tptrain.config_error import ConfigError
    from tptrain.data import shards

    shards._LEAST_BYTES = shards._MOST_BYTES = 100_000
    for line in sys.stdin:
        listen, said = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(listen)
            code = 1
            try:
                build(said=said, **json.loads(line))
                code = 0
            except ConfigError as error:
                os.write(said, f"{error}\n".encode())
                code = 2
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(said)
        print(child, flush=True)
        with os.fdopen(listen) as file:
            lines = file.read().splitlines()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines]), flush=True)


if __name__ == "__main__":
    main()
