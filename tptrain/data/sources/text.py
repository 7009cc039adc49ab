"""Text files, each of which is one document, byte for byte.

text          path: a file, a folder (its *.txt and *.md, at any depth), a glob or a list of them
python_docs   the sources of the running Python's standard library, and the topics of its `help()`
"""

from __future__ import annotations

import codecs
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tptrain.config_error import as_text, refuse
from tptrain.data.documents import Documents, write_documents
from tptrain.data.fingerprint import hash_of
from tptrain.data.sources.common import by_rows, cache_file
from tptrain.data.sources.files import Files, list_files, walk

if TYPE_CHECKING:
    import datasets

_NOT_DOCS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_TOPICS_FILE = "pydoc_data/topics.py"
_TOPIC = "topic:"


@dataclass(frozen=True)
class TextSource:
    """The files that a path names."""

    files: Files
    asked: Any
    """The path as it was asked for."""
    prefix: str
    column: str = "text"

    @property
    def label(self) -> str:
        """For reports."""
        return f"text {as_text(self.asked)}"

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times."""
        return hash_of("text", *self.files.stamps())

    def load(self, cache_dir: Path) -> Documents:
        """All files. Raises ConfigError for one that is not UTF-8 text."""
        for path in self.files.paths():
            self._check(path)
        file = cache_file(cache_dir, self.fingerprint())
        dataset = write_documents(map(_read, self.files.paths()), self.column, file)
        return Documents(dataset, self.column, self.files.names, _Named(tuple(self.files.paths())), (self.column,), self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """One row a file; each is checked when it is reached."""
        return by_rows(_stream_text, self.column, self.files.paths(), source=self)

    def _check(self, path: str) -> None:
        problem = _problem(path)
        if problem:
            rule = f"names {path}, which {problem}"
            remedy = f"make it readable UTF-8 text, or use a {self.prefix}.path that leaves it out"
            raise refuse(f"{self.prefix}.path", self.asked, rule, remedy)


@dataclass(frozen=True)
class PythonDocs:
    """Every module of the standard library but its tests, and then the topics, by their names.

    The module that holds the topics is left out, since its text comes as topics, and so are modules that are not UTF-8.
    """

    files: Files
    prefix: str
    label: str = "python_docs"
    column: str = "text"

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times, and of the Python version."""
        names = (*self.files.names, _TOPICS_FILE)
        present = Files(self.files.base, tuple(name for name in names if (self.files.base / name).exists()))
        return hash_of(self.label, sys.version, *present.stamps())

    def load(self, cache_dir: Path) -> Documents:
        """All modules that are UTF-8, and all topics."""
        names = (*(name for name in self.files.names if _problem(str(self.files.base / name)) is None), *_topic_names())
        texts = map(_read, (_path(self.files.base, name) for name in names))
        dataset = write_documents(texts, self.column, cache_file(cache_dir, self.fingerprint()))
        return Documents(dataset, self.column, names, _Named(names), (self.column,), self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """One row a document."""
        return by_rows(_stream_python_docs, self.column, [*self.files.paths(), *_topic_names()])


def open_text(asked: Any, prefix: str) -> TextSource:
    """The files that `asked`, the value of `prefix`.path, names. Raises ConfigError where there is none."""
    return TextSource(list_files(asked, prefix, "text", (".txt", ".md"), ".txt or .md"), asked, prefix)


def open_python_docs(prefix: str) -> PythonDocs:
    """The standard library. Raises ConfigError where its sources are not installed."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for name in walk(root, (".py",), _NOT_DOCS) if name != _TOPICS_FILE]
    if not names:
        remedy = "use data=text data.path=FOLDER" if prefix == "data" else f"use {prefix}.source=text {prefix}.path=FOLDER"
        raise refuse(f"{prefix}.source", "python_docs", f"finds no standard library source under {root}", remedy)
    return PythonDocs(Files(root, tuple(names)), prefix)


@dataclass(frozen=True)
class _Named:
    names: tuple[str, ...]

    def __call__(self, index: int) -> str:
        return self.names[index]


def _stream_text(files: list[str], column: str, source: TextSource) -> Iterator[dict[str, str]]:
    for path in files:
        source._check(path)
        yield {column: _read(path)}


def _stream_python_docs(files: list[str], column: str) -> Iterator[dict[str, str]]:
    for path in files:
        if path.startswith(_TOPIC) or _problem(path) is None:
            yield {column: _read(path)}


def _path(base: Path, name: str) -> str:
    return name if name.startswith(_TOPIC) else str(base / name)


def _read(path: str) -> str:
    """The text of a file, or of a topic by `topic:NAME`, which no path of ours looks like: those are joined to a folder."""
    if path.startswith(_TOPIC):
        return _topics()[path.removeprefix(_TOPIC)]
    return Path(path).read_bytes().decode("utf-8")


def _topic_names() -> list[str]:
    return [_TOPIC + name for name in sorted(_topics())]


def _topics() -> dict[str, str]:
    """The texts that `help("...")` shows, by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def _problem(path: str) -> str | None:
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
