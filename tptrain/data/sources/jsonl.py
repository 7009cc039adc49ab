"""JSON Lines: an object a line, one of whose columns holds the text; plain or compressed by gzip, zstd, bzip2 or xz.

Blank lines are passed over; a byte order mark at a file's start and CRLF line ends are no part of a row. A file that is one
JSON array of objects is read too, whole. Lines are parsed here rather than by datasets' `json` loader, because that guesses each
block's types from its values: a block whose texts all look like dates comes back reformatted, numbers come back as text, and
files whose other columns differ are refused.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from tptrain.config_error import ConfigError, refuse
from tptrain.data.documents import Documents, bad_field, kind_of, write_documents
from tptrain.data.sources.common import RowFiles, by_rows, cache_file
from tptrain.data.sources.files import list_files
from tptrain.data_config import SourceConfig

if TYPE_CHECKING:
    import datasets

_SUFFIXES = tuple(ending + packed for ending in (".jsonl", ".json") for packed in ("", ".gz", ".zst", ".bz2", ".xz"))


@dataclass(frozen=True)
class JsonlSource(RowFiles):
    """JSON Lines files."""

    kind = "jsonl"

    def load(self, cache_dir: Path) -> Documents:
        """All rows, by way of an arrow file in cache_dir. Raises ConfigError for the first bad row."""
        paths = self.files.paths()
        texts = (row[self.column] for row in _stream(paths, self.column, self))
        dataset = write_documents(texts, self.column, cache_file(cache_dir, self.fingerprint()))
        return Documents(dataset, self.column, None, _Where(tuple(paths), self), (self.column,), self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """Row after row."""
        return by_rows(_stream, self.column, self.files.paths(), source=self)

    def _rows(self, path: str) -> Iterator[tuple[int, str]]:
        """Number of the row and its text; a row's number is its line's, or its place in an array, from 1."""
        for number, row in self._objects(path):
            where = f"{path}, row {number}"
            if not isinstance(row, dict):
                raise self._bad_file(path, f"whose row {number} is {kind_of(row).removesuffix(', not text')}, not an object with columns")
            if self.column not in row:
                raise bad_field(self.prefix, self.column, "is missing", where, row)
            text = row[self.column]
            if not isinstance(text, str):
                raise bad_field(self.prefix, self.column, f"is {kind_of(text)}", where, row)
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise bad_field(self.prefix, self.column, "holds half a surrogate pair, which is no text", where, row) from None
            yield number, text

    def _objects(self, path: str) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if number == 1:
                        line = line.removeprefix(BOM_UTF8)
                        if line.lstrip().startswith(b"["):
                            yield from enumerate(json.loads((line + file.read()).decode()), 1)
                            return
                    if line.strip():
                        yield number, json.loads(line.rstrip(b"\r\n").decode())
        except UnicodeDecodeError as error:
            raise self._bad_file(path, f"whose row {number} is not UTF-8 text at byte {error.start} of it") from error
        except (ValueError, RecursionError) as error:
            raise self._bad_file(path, f"whose row {number} is no JSON ({error})") from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise self._bad_file(path, f"which cannot be read after row {number} ({error})") from error

    def _bad_file(self, path: str, fault: str) -> ConfigError:
        remedy = f"correct it, or use a {self.prefix}.path that leaves it out"
        return refuse(f"{self.prefix}.path", self.asked, f"names {path}, {fault}", remedy)


def open_jsonl(part: SourceConfig, prefix: str) -> JsonlSource:
    """The files that part.path names. Raises ConfigError where there is none."""
    files = list_files(part.path, prefix, "jsonl", _SUFFIXES, ".jsonl or .json")
    return JsonlSource(files, part.path, part.text_column, prefix)


def _stream(files: list[str], column: str, source: JsonlSource) -> Iterator[dict[str, str]]:
    for path in files:
        for _, text in source._rows(path):
            yield {column: text}


@dataclass(frozen=True)
class _Where:
    """Finds a row by reading the files once more."""

    paths: tuple[str, ...]
    source: JsonlSource

    def __call__(self, index: int) -> str:
        rows = ((path, number) for path in self.paths for number, _ in self.source._rows(path))
        path, number = next(islice(rows, index, None))
        return f"{path}, row {number}"


def _open(path: str) -> IO[bytes]:
    """A file's content, unpacked; its first bytes tell how it is packed."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path))
    if start.startswith(b"BZh"):
        return bz2.open(path)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(path, compression="zstd"), 1 << 20)
    return open(path, "rb", buffering=1 << 20)
