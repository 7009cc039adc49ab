"""The first documents of a stream as a source of their own: what data.val_documents holds out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.config_error import refuse
from tptrain.data.documents import Documents, bad_field, kind_of, write_documents
from tptrain.data.sources import Source

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
        return hashlib.sha256(f"head {self.count} {self.source.fingerprint()}".encode()).hexdigest()

    def load(self, cache_dir: Path) -> Documents:
        """The documents, by way of an arrow file in cache_dir. Raises ConfigError for a bad row, and where nothing is left to train on."""
        path = Path(cache_dir) / f"documents-{self.fingerprint()[:16]}.arrow"
        dataset = write_documents(self.texts(), self.column, path)
        return Documents(dataset, self.column, None, self._where, (self.column,), self.prefix)

    def stream(self) -> datasets.IterableDataset:
        """The same rows, one after the other."""
        return self.source.stream().take(self.count)

    def texts(self) -> Iterator[str]:
        """The documents' texts. Raises ConfigError as `load` does."""
        number = 0
        for number, row in enumerate(islice(self.source.stream(), self.count + 1), 1):
            if number > self.count:
                return
            text = row.get(self.column)
            if not isinstance(text, str):
                fault = f"is {kind_of(text)}" if self.column in row else "is missing"
                raise bad_field(self.prefix, self.column, fault, self._where(number - 1), row)
            yield text
        if not number:
            raise refuse(f"{self.prefix}.source", self.source.label, "has no documents", "use a source with some")
        rule = f"leaves nothing to train on of {self.source.label}, which has {number} documents"
        raise refuse("data.val_documents", self.count, rule, "use fewer, or data.streaming=false")

    def _where(self, index: int) -> str:
        return f"{self.source.label}, row {index + 1}"
