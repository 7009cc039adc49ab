"""The logger "tptrain": the launcher gives it the rank's file, and its warnings also reach the terminal.

What the terminal shows otherwise is the console's business, so no line appears there twice.
"""

from __future__ import annotations

import logging
import sys

LOGGER = logging.getLogger("tptrain")
"""Lines at INFO go to the rank's file only; WARNING and above also to stderr, once `prepare_logger` has run."""


class StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, which a live display puts its own stand-in for."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _Warnings(StderrHandler):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def prepare_logger() -> logging.Logger:
    """Let INFO through, keep lines away from the root logger's handlers, show warnings on stderr. Safe to call again."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    if not any(isinstance(handler, _Warnings) for handler in LOGGER.handlers):
        LOGGER.addHandler(_Warnings(logging.WARNING))
    return LOGGER
