"""Where documents come from:

    text          files, each one document                               text.py
    python_docs   the running Python's standard library and its help     text.py
    jsonl         JSON Lines, plain or compressed, a row a document      jsonl.py
    parquet       parquet files, a row a document                        parquet.py
    saved         a folder made by datasets' save_to_disk                saved.py
    hub           a data set on the Hugging Face hub                     hub.py

`open_source` looks at names, sizes and times only, in milliseconds, which is all that finding a finished store needs. `load`
gives all documents as a memory-mapped `datasets.Dataset`, `stream` the same rows, in the same order, one after the other as a
`datasets.IterableDataset`. A text is never changed: line ends, byte order marks in it and blanks stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tptrain.config_error import refuse
from tptrain.data.documents import Documents
from tptrain.data.sources.hub import open_hub
from tptrain.data.sources.jsonl import open_jsonl
from tptrain.data.sources.parquet import open_parquet
from tptrain.data.sources.saved import open_saved
from tptrain.data.sources.text import open_python_docs, open_text
from tptrain.data_config import SourceConfig

if TYPE_CHECKING:
    import datasets

__all__ = ["Source", "open_source"]


class Source(Protocol):
    """Documents that are found, but not yet read."""

    @property
    def label(self) -> str:
        """For reports: `python_docs`, `jsonl corpus/*.jsonl`, `hub HuggingFaceFW/fineweb-edu sample-10BT`."""

    @property
    def column(self) -> str:
        """The column of the rows that holds their text."""

    def fingerprint(self) -> str:
        """Hash of what the documents follow from, in hex digits: names, sizes and times of files; the name, subset, split and
        revision on the hub. Reads no content: a file changed in place, with the same size and time, goes unnoticed."""

    def load(self, cache_dir: Path) -> Documents:
        """All documents. What must be written for that goes to cache_dir; a data set of the hub, to Hugging Face's own cache.

        Raises ConfigError for what cannot be read, is no UTF-8 text or lacks the column.
        """

    def stream(self) -> datasets.IterableDataset:
        """The rows, read while they are asked for; nothing is written. Raises ConfigError, now or at a bad row."""


def open_source(part: SourceConfig, prefix: str = "data", split: str | None = None) -> Source:
    """The source that `part`, whose keys begin with `prefix`, describes; `split` takes the place of its own split.

    Raises ConfigError where it is not there, and ValueError for memorize and mixture, which are no source of documents.
    """
    if split is not None and part.source not in ("hub", "saved"):
        raise refuse(f"{prefix}.val_split", split, f"names a split, and source={part.source} has none", "leave it away")
    if part.source == "python_docs":
        return open_python_docs(prefix)
    if part.source == "text":
        return open_text(part.path, prefix)
    if part.source == "jsonl":
        return open_jsonl(part, prefix)
    if part.source == "parquet":
        return open_parquet(part, prefix)
    if part.source == "saved":
        return open_saved(part, prefix, split)
    if part.source == "hub":
        return open_hub(part, prefix, split)
    raise ValueError(f"{part.source} is no source of documents")
