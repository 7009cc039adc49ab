"""Documents: the texts of a source as rows of a memory-mapped `datasets.Dataset`, read a range at a time.

They pickle to the names of their files, so that worker processes open the same maps. Where a text cannot be used, the
message names the file and the row, which `where` finds; nothing is looked up before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.config_error import ConfigError, refuse

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 1000, 1 << 24


@dataclass(frozen=True)
class Documents:
    """The documents of one source, in order."""

    dataset: datasets.Dataset
    """Memory-mapped arrow with the column `column`; one row a document."""
    column: str
    names: tuple[str, ...] | None
    """The files that the documents are; None where documents are rows, known by their number."""
    where: Callable[[int], str]
    """where(index): the file and the row of a document, for a message: `corpus/a.jsonl, row 17`."""
    columns: tuple[str, ...] = ()
    """All columns that the source has, for a message."""
    prefix: str = "data"
    """Where the source stands in the config, for a message."""

    def __len__(self) -> int:
        return self.dataset.num_rows

    def texts(self, first: int, last: int) -> list[str]:
        """The texts of documents first .. last - 1, exactly as stored.

        Raises ConfigError for a row whose text is null or not UTF-8, naming file, row and columns.
        """
        try:
            texts = self.dataset[first:last][self.column]
        except UnicodeDecodeError:
            if last - first == 1:
                raise bad_field(self.prefix, self.column, "is not UTF-8 text", self.where(first), self.columns) from None
            return [text for index in range(first, last) for text in self.texts(index, index + 1)]
        for index, text in enumerate(texts, first):
            if not isinstance(text, str):
                raise bad_field(self.prefix, self.column, f"is {kind_of(text)}", self.where(index), self.columns)
        return texts


@dataclass(frozen=True)
class RowNumber:
    """`where` of rows that are known by their number in a source: `hub c4 en, row 17`."""

    label: str

    def __call__(self, index: int) -> str:
        """The row of document `index`, counted from 1."""
        return f"{self.label}, row {index + 1}"


def bad_field(prefix: str, column: str, fault: str, where: str, columns: Iterable[str]) -> ConfigError:
    """The refusal of a row whose text cannot be used: `data.text_column=text is null in a.jsonl, row 2 (columns: id, text): ...`."""
    listed = ", ".join(columns) or "none"
    remedy = f"correct or remove that row, or use {prefix}.text_column=COLUMN with one that always holds text"
    return refuse(f"{prefix}.text_column", column, f"{fault} in {where} (columns: {listed})", remedy)


def kind_of(value: object) -> str:
    """What a value that is no text is, in a message: `null`, or `int, not text`."""
    return "null" if value is None else f"{type(value).__name__}, not text"


def check_column(prefix: str, column: str, schema: pa.Schema, where: str) -> None:
    """Whether `schema` has the column and its type is text. Raises ConfigError, naming `where` and the columns."""
    import pyarrow as pa

    if column not in schema.names:
        raise bad_field(prefix, column, "is missing", where, schema.names)
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise bad_field(prefix, column, "is null" if pa.types.is_null(kind) else f"is {kind}, not text", where, schema.names)


def write_documents(texts: Iterable[str], column: str, path: Path) -> datasets.Dataset:
    """Write `texts` to the arrow file `path`, whole or not at all, and map it. An existing file is taken as it is.

    Holds at most some 16 M characters and one document more in memory. Raises UnicodeEncodeError for lone surrogates.
    """
    import datasets
    import pyarrow as pa

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        schema = pa.schema({column: pa.large_string()})
        try:
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in _batches(texts):
                    writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
