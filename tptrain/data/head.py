"""The texts of a stream from its start; its first documents as a source of their own, which data.val_documents holds out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.config_error import ConfigError, refuse
from tptrain.data.dealer import unreadable
from tptrain.data.documents import Documents, RowNumber, bad_field, kind_of, write_documents
from tptrain.data.fingerprint import hash_of
from tptrain.data.sources import Source
from tptrain.data.sources.common import cache_file

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Head:
    """The first `count` documents of `source`, whose keys begin with `prefix`."""

    source: Source
    count: int
    prefix: str = "data"

    @property
    def label(self) -> str:
        """For reports."""
        return f"the first {self.count} of {self.source.label}"

    @property
    def column(self) -> str:
        """The column of the rows that holds their text."""
        return self.source.column

    def fingerprint(self) -> str:
        """Hash of the source's fingerprint and the count."""
        return hash_of("head", self.count, self.source.fingerprint())

    def load(self, cache_dir: Path) -> Documents:
        """The documents, by way of an arrow file in cache_dir. Raises ConfigError for a bad row, and where nothing is left to train on."""
        dataset = write_documents(self.texts(), self.column, cache_file(cache_dir, self.fingerprint()))
        return Documents(dataset, self.column, None, RowNumber(self.source.label), (self.column,), self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """The same rows, one after the other."""
        return self.source.stream().take(self.count)

    def texts(self) -> Iterator[str]:
        """The documents' texts. Raises ConfigError as `load` does."""
        number = 0
        for number, text in enumerate(islice(texts_of(self.source, self.prefix), self.count + 1), 1):
            if number > self.count:
                return
            yield text
        if not number:
            raise refuse(f"{self.prefix}.source", self.source.label, "has no documents", "use a source with some")
        rule = f"leaves nothing to train on of {self.source.label}, which has {number} documents"
        raise refuse("data.val_documents", self.count, rule, "use fewer, or data.streaming=false")


def texts_of(source: Source, prefix: str = "data") -> Iterator[str]:
    """The texts of a stream, one after the other. Raises ConfigError for a row without text, and where the stream cannot be read."""
    rows, number = iter(source.stream()), 0
    while True:
        try:
            row = next(rows, None)
        except ConfigError:
            raise
        except Exception as error:  # whatever a reader of any format raises
            raise unreadable(source.label, number, error) from error
        if row is None:
            return
        text = row.get(source.column)
        if not isinstance(text, str):
            fault = f"is {kind_of(text)}" if source.column in row else "is missing"
            raise bad_field(prefix, source.column, fault, RowNumber(source.label)(number), row)
        yield text
        number += 1
