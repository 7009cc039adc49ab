"""What fails because data.store_dir cannot be written to, or is too small, as a refusal that names the file."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tptrain.config_error import ConfigError, refuse
from tptrain.data.progress import BuildProgress


class Space:
    """A block that writes below `folder`. As a context manager, turns the disk's errors into ConfigErrors."""

    def __init__(self, store_dir: str, folder: Path) -> None:
        self.progress: BuildProgress | None = None
        """Of the tokenising, from when it has begun."""
        self._store_dir, self._folder = store_dir, folder
        self._where: Path | None = None
        self._free_bytes = 0

    def __enter__(self) -> Space:
        there = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        self._free_bytes = shutil.disk_usage(there).free
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        found = _disk_error(error)
        if found is None or isinstance(error, ConfigError):
            return
        path = found.filename
        if found.errno in (errno.ENOSPC, errno.EDQUOT):
            raise self._full(path or self._where) from error
        if path is not None and (Path(path).is_relative_to(self._folder) or self._folder.is_relative_to(path)):
            where = f": {path}" if Path(path).is_relative_to(self._folder) and Path(path) != self._folder else ""
            raise refuse("data.store_dir", self._store_dir, f"cannot hold a token store ({found.strerror}{where})",
                         "use data.store_dir=FOLDER with one that you can write to") from error  # fmt: skip

    @contextmanager
    def loading(self, folder: Path) -> Iterator[None]:
        """A block in which others write below `folder`, and may not say what."""
        self._where = folder
        yield
        self._where = None

    def _full(self, path: object) -> ConfigError:
        free = f"{_megabytes(self._free_bytes)} were free"
        needed = self.progress.needed_bytes if self.progress else None
        sizes = f"{free}, and its ids alone need about {_megabytes(needed)}" if needed else f"{free}, and its text alone needs more"
        where = path or self._folder
        return refuse("data.store_dir", self._store_dir, f"has no room for the token store, whose {where} could not be written ({sizes})",
                      "free some of that disk, or use data.store_dir=FOLDER on a larger one")  # fmt: skip


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: a full disk's first, as libraries wrap it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    found = [one for one in chain if isinstance(one, OSError)]
    full = [one for one in found if one.errno in (errno.ENOSPC, errno.EDQUOT)]
    return next(iter(full or found), None)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
