"""Stopping a sweep whose jobs run in worker processes of this one, several at a time, as under the joblib launcher.

The workers hear of the signal too, and their jobs save and stop. A mark in the sweep's folder keeps them from starting others.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil

from tptrain.sweep.plan import STOPPING, Plan


def stop(plan: Plan, number: signal.Signals) -> None:
    """Have the jobs that run save and stop, and no other start. number: the signal that asked for it."""
    (plan.folder / STOPPING).touch()
    if number == signal.SIGINT and sys.stdin and sys.stdin.isatty():
        return  # a terminal sends it to all processes itself
    for worker in psutil.Process().children():
        worker.send_signal(signal.SIGTERM)  # which Python's helper processes ignore


def end() -> None:
    """Kill the workers; their ranks die with them."""
    for worker in psutil.Process().children():
        worker.kill()


def is_stopping(sweep_dir: Path) -> bool:
    """Whether no other job is to start."""
    return (sweep_dir / STOPPING).exists()


def forget(sweep_dir: Path) -> None:
    """Once the sweep has ended: the next one in this folder may start jobs."""
    (sweep_dir / STOPPING).unlink(missing_ok=True)
