"""Where documents come from: files on this machine, one document each.

    text          data.path: a file, a folder (its *.txt and *.md, at any depth) or a glob (what it matches)
    python_docs   the sources of the running Python's standard library, and the topics of its `help()`

A source is first listed, in milliseconds: names, sizes and times, which is all that finding a finished store needs.
Then it is checked (`checked`: is each file UTF-8 text?) and read, byte for byte, by Hugging Face `datasets`.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tptrain.config_error import refuse
from tptrain.data_config import SourceConfig

_TEXT_SUFFIXES = (".txt", ".md")
_NOT_DOCS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_TOPICS_FILE = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Source:
    """Files to be read as documents."""

    label: str
    """text or python_docs."""
    base: Path
    """Folder that `files` are relative to."""
    files: tuple[str, ...]
    """Paths with forward slashes, sorted: the documents' names."""
    path: str | None = None
    """data.path as it was asked for; None for python_docs."""

    def fingerprint(self) -> str:
        """Hash of each file's name, size and modification time (and of the base folder), without reading any.

        Hex digits. A file changed in place, with the same size and the same time stamp, goes unnoticed.
        """
        listing = [self.label, str(self.base.resolve()), sys.version if self.label == "python_docs" else ""]
        for name in (*self.files, _TOPICS_FILE) if self.label == "python_docs" else self.files:
            try:
                stat = os.stat(self.base / name)
            except FileNotFoundError:
                continue  # a Python without help topics
            listing.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def checked(self) -> Source:
        """This source with only files that are UTF-8 text. Raises ConfigError where the user named one that is not."""
        problems = {name: problem for name in self.files if (problem := _problem(self.base / name))}
        if problems and self.path is not None:
            name, problem = next(iter(problems.items()))
            raise refuse("data.path", self.path, f"names {self.base / name}, which {problem}",
                         "make it readable UTF-8 text, or use a data.path that leaves it out")  # fmt: skip
        return replace(self, files=tuple(name for name in self.files if name not in problems))

    def names(self) -> list[str]:
        """Names of the documents, in the order in which `read` yields them."""
        return [*self.files, *(f"topic:{topic}" for topic in sorted(self._topics()))]

    def read(self, cache_dir: Path) -> Iterator[tuple[str, str]]:
        """Each document's name and text, exactly as stored: line ends, byte order marks and empty files included.

        `datasets` keeps its files in cache_dir and writes nowhere else. Its text loader is not used, because that
        turns every line end into a bare newline; the rows come from a generator instead.
        """
        import datasets

        def rows() -> Iterator[dict[str, str]]:
            for name in self.files:
                yield {"text": (self.base / name).read_bytes().decode("utf-8")}
            for _, text in sorted(self._topics().items()):
                yield {"text": text}

        bars_were_on = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            dataset = datasets.Dataset.from_generator(
                rows,
                features=datasets.Features({"text": datasets.Value("large_string")}),
                cache_dir=str(cache_dir),
                fingerprint="documents",  # names the cache; without it, datasets pickles the generator to make a hash
                writer_batch_size=32,  # documents held in memory at once
            )
        finally:
            if bars_were_on:
                datasets.enable_progress_bars()
        for name, row in zip(self.names(), dataset, strict=True):
            yield name, row["text"]

    def _topics(self) -> dict[str, str]:
        """The texts that `help("...")` shows, by topic."""
        if self.label != "python_docs":
            return {}
        try:
            from pydoc_data.topics import topics
        except ImportError:
            return {}
        return dict(topics)


def open_source(part: SourceConfig, prefix: str = "data", split: str | None = None) -> Source:
    """The documents that `part`, whose keys begin with `prefix`, names. Raises ConfigError."""
    return list_source(part)


def list_source(data: SourceConfig) -> Source:
    """The files of data.source text or python_docs. Raises ConfigError where there are none."""
    return _list_python_docs() if data.source == "python_docs" else _list_text(data.path)


def _list_python_docs() -> Source:
    """Every module of the standard library but its tests. The topics' own module is left out: its text comes as topics."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [name for name in _walk(root, (".py",), _NOT_DOCS) if name != _TOPICS_FILE]
    if not files:
        raise refuse("data.source", "python_docs", f"finds no standard library source under {root}", "use data=text data.path=FOLDER")
    return Source("python_docs", root, tuple(files))


def _list_text(asked: str | None) -> Source:
    """The files that data.path names; what exists under exactly that name comes before what it matches as a glob."""
    if not asked:
        raise refuse("data.path", asked, "names no text", "use data.path=FILE, FOLDER or 'GLOB'")
    path = Path(asked).expanduser()
    try:
        if path.is_dir():
            base, files = path, _walk(path, _TEXT_SUFFIXES)
            if not files:
                raise refuse(
                    "data.path", asked, "holds no .txt or .md file", f"name other files by a glob: data.path='{asked.rstrip('/')}/**/*'"
                )
        elif path.exists():
            base, files = path.parent, [path.name]
        elif glob.has_magic(asked):
            base = _fixed_part(path)
            files = sorted(
                {Path(match).relative_to(base).as_posix() for match in glob.iglob(str(path), recursive=True) if os.path.isfile(match)}
            )
            if not files:
                raise refuse("data.path", asked, f"matches no file (from {Path.cwd()})", "use a glob that matches text files")
        else:
            raise refuse("data.path", asked, f"does not exist (from {Path.cwd()})", "use a file, a folder or a glob of text files")
        if path.exists() and not path.is_dir() and not path.is_file():
            raise refuse("data.path", asked, "is no regular file", "use a file, a folder or a glob of text files")
    except OSError as error:
        raise refuse("data.path", asked, f"cannot be read ({error.strerror})", "use a path that you can read") from error
    return Source("text", base, tuple(files), path=asked)


def _fixed_part(pattern: Path) -> Path:
    """The folder before a glob's first wildcard: `notes` for `notes/**/*.md`."""
    parts = pattern.parts
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _walk(root: Path, suffixes: tuple[str, ...], skip: frozenset[str] = frozenset()) -> list[str]:
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


def _problem(path: Path) -> str | None:
    """Why a file is no readable UTF-8 text, or None. Reads it in blocks of 1 MiB."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done_bytes = held_bytes = 0
    try:
        with open(path, "rb") as file:
            while True:
                held_bytes = len(decoder.getstate()[0])  # of a character that a block's end cut in two
                block = file.read(1 << 20)
                decoder.decode(block, final=not block)
                done_bytes += len(block)
                if not block:
                    return None
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text at byte {done_bytes - held_bytes + error.start}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
