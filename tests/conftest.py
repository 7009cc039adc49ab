"""Fixtures of several rooms' tests, and how files are shared out to pytest's workers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = (
    "test_equality.py", "test_slurm.py", "test_hosts.py", "test_wheel.py", "test_pipeline_equality.py", "test_default_run.py",
    "test_stop.py", "test_train.py", "test_chain.py", "test_sweep.py", "test_kills.py", "test_check.py",
)  # fmt: skip
"""Files that take a minute or so each. They come first, so that none is left for one worker alone in the end, and in turn: one that
computes beside one that waits."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
