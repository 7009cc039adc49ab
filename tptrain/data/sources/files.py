"""Which files a source means by its `path`: a file, a folder (its files with a known ending, at any depth), a glob, or a list of them.

What exists under exactly the given name comes before what that name matches as a glob. Files of one entry come in the order of
their names, entries in the order of the list, and a file that two entries name comes once. No file is opened here.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config_error import as_text, refuse


@dataclass(frozen=True)
class Files:
    """Files in the order in which they are read."""

    base: Path
    """Folder that `names` are relative to."""
    names: tuple[str, ...]
    """Paths with forward slashes."""

    def paths(self) -> list[str]:
        """The names with the base before them."""
        return [str(self.base / name) for name in self.names]

    def stamps(self) -> list[str]:
        """The base folder, and each file's name, size and modification time: changes with any of them. Reads no file."""
        stats = ((name, os.stat(self.base / name)) for name in self.names)
        return [str(self.base.resolve()), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]


def list_files(asked: Any, prefix: str, kind: str, suffixes: tuple[str, ...], endings: str) -> Files:
    """The files that `asked`, the value of `prefix`.path, names.

    kind: of files, for a message: text. suffixes: of a folder's files, in lower case; endings: the same for a message.
    Raises ConfigError where there is none.
    """
    entries = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    if not entries or not all(isinstance(entry, (str, int, float)) and str(entry) for entry in entries):
        raise refuse(f"{prefix}.path", asked, f"names no {kind}", f"use {prefix}.path=FILE, FOLDER or 'GLOB'")
    listed = [_list_entry(str(entry), prefix, kind, suffixes, endings) for entry in entries]
    if len(listed) == 1:
        return listed[0]
    paths = [os.path.abspath(path) for files in listed for path in files.paths()]
    base = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    return Files(base, tuple(Path(path).relative_to(base).as_posix() for path in dict.fromkeys(paths)))


def _list_entry(asked: str, prefix: str, kind: str, suffixes: tuple[str, ...], endings: str) -> Files:
    key, remedy = f"{prefix}.path", f"use a file, a folder or a glob of {kind} files"
    path = Path(asked).expanduser()
    try:
        if path.is_dir():
            if kind != "text" and is_saved(path):
                raise refuse(key, asked, "is a folder made by save_to_disk", f"use {prefix}.source=saved {key}={as_text(asked)}")
            base, names = path, walk(path, suffixes)
            if not names:
                raise refuse(key, asked, f"holds no {endings} file", f"name other files by a glob: {key}='{asked.rstrip('/')}/**/*'")
        elif path.exists():
            base, names = path.parent, [path.name]
        elif glob.has_magic(asked):
            base = _fixed_part(path)
            matches = {match for match in glob.iglob(str(path), recursive=True) if os.path.isfile(match)}
            names = sorted(Path(match).relative_to(base).as_posix() for match in matches)
            if not names:
                raise refuse(key, asked, f"matches no file (from {Path.cwd()})", f"use a glob that matches {kind} files")
        else:
            raise refuse(key, asked, f"does not exist (from {Path.cwd()})", remedy)
        if path.exists() and not path.is_dir() and not path.is_file():
            raise refuse(key, asked, "is no regular file", remedy)
    except OSError as error:
        raise refuse(key, asked, f"cannot be read ({error.strerror})", "use a path that you can read") from error
    return Files(base, tuple(names))


def is_saved(folder: Path) -> bool:
    """Whether `folder` was made by save_to_disk, of one data set or of several splits."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _fixed_part(pattern: Path) -> Path:
    """The folder before a glob's first wildcard: `notes` for `notes/**/*.md`."""
    parts = pattern.parts
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def walk(root: Path, suffixes: tuple[str, ...], skip: Iterable[str] = ()) -> list[str]:
    """Files under root with one of the suffixes, sorted, relative to it. Follows links once; passes over hidden names.

    Raises OSError for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        paths = (Path(folder, name) for name in files if name.lower().endswith(suffixes) and not name.startswith("."))
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)
