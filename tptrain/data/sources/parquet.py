"""Parquet files, read by `datasets`: a row is a document, and only the column that holds the text is read.

The column's type is looked up in every file first, because datasets turns numbers into text where an earlier file has text.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tptrain.config_error import ConfigError, refuse
from tptrain.data.documents import Documents, check_column
from tptrain.data.sources.common import RowFiles, quietly
from tptrain.data.sources.files import Files, list_files
from tptrain.data_config import SourceConfig

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class ParquetSource(RowFiles):
    """Parquet files."""

    kind = "parquet"

    def load(self, cache_dir: Path) -> Documents:
        """All rows, by way of an arrow file that `datasets` keeps in cache_dir. Raises ConfigError for a file that is bad."""
        columns = self._check_files()
        return Documents(self._load(cache_dir), self.column, None, _Where(tuple(self.files.paths())), columns, self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """Row after row. Raises ConfigError for a file that lacks the column."""
        self._check_files()
        return self._load(None)

    def _load(self, cache_dir: Path | None) -> Any:
        """A Dataset in cache_dir; for None, an IterableDataset."""
        import datasets

        files = [glob.escape(path) for path in self.files.paths()]
        kept = str(cache_dir) if cache_dir else None
        try:
            with quietly():
                return datasets.load_dataset(
                    "parquet", data_files=files, split="train", columns=[self.column], cache_dir=kept, streaming=cache_dir is None
                )
        except Exception:
            for path in self.files.paths():
                self._check_rows(path)
            raise

    def _check_files(self) -> tuple[str, ...]:
        """Whether each file's column is there and holds text, by the files' schemas. Returns the columns of the first file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: tuple[str, ...] = ()
        for path in self.files.paths():
            if "::" in path:  # which datasets takes for two addresses, one in the other
                raise self._bad_file(path, "whose name has '::' in it")
            try:
                schema = pq.read_schema(path)
            except (pa.ArrowException, OSError) as error:
                raise self._bad_file(path, f"which is no parquet file ({_line(error)})") from error
            check_column(self.prefix, self.column, schema, f"{path}, row 1")
            columns = columns or tuple(schema.names)
        return columns

    def _check_rows(self, path: str) -> None:
        """Whether the column's values can be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        row = 1
        try:
            for batch in pq.ParquetFile(path).iter_batches(columns=[self.column]):
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise self._bad_file(path, f"which cannot be read from row {row} on ({_line(error)})") from error

    def _bad_file(self, path: str, fault: str) -> ConfigError:
        remedy = f"correct it, or use a {self.prefix}.path that leaves it out"
        return refuse(f"{self.prefix}.path", self.asked, f"names {path}, {fault}", remedy)


def open_parquet(part: SourceConfig, prefix: str) -> ParquetSource:
    """The files that part.path names. Raises ConfigError where there is none."""
    files = list_files(part.path, prefix, "parquet", (".parquet",), ".parquet")
    files = Files(Path(files.base).absolute(), files.names)
    return ParquetSource(files, part.path, part.text_column, prefix)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True)
class _Where:
    """Finds a row by the files' row counts."""

    paths: tuple[str, ...]

    def __call__(self, index: int) -> str:
        for path, first, end in self._ranges():
            if index < end:
                return f"{path}, row {index - first + 1}"
        raise IndexError(f"row {index}")

    def _ranges(self) -> Iterator[tuple[str, int, int]]:
        import pyarrow.parquet as pq

        first = 0
        for path in self.paths:
            end = first + pq.read_metadata(path).num_rows
            yield path, first, end
            first = end
