"""A source of rows or of named files that the test gives, and one that a test can spoil."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from tptrain.data.build import build_store
from tptrain.data.documents import Documents, write_documents
from tptrain.data.tokenizers import ByteTokenizer
from tptrain.data_config import DataConfig


def row_name(index: int) -> str:
    """As a message has it."""
    return f"rows.jsonl, row {index + 1}"


@dataclass
class RowSource:
    """Texts as a source; None among them is a null."""

    rows: list[str | None]
    names: tuple[str, ...] | None = None
    known_as: str = "rows"
    """What the fingerprint follows from: the same for other rows is what a changed file with an old time stamp is."""
    label: str = "rows"
    column: str = "text"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.known_as.encode()).hexdigest()

    def load(self, cache_dir: Path) -> Documents:
        if None in self.rows:
            dataset = datasets.Dataset.from_dict({"text": self.rows})
        else:
            dataset = write_documents(self.rows, "text", cache_dir / "rows.arrow")  # type: ignore[arg-type]
        return Documents(dataset, "text", self.names, partial(row_name), ("text",))

    def stream(self) -> Any:
        raise NotImplementedError


def build(
    source: RowSource, stores: Path, num_proc: Any = 1, val_fraction: float = 0.25, report: Callable[[str], None] = lambda line: None,
    tokenizer: Any = None,
) -> Path:  # fmt: skip
    """build_store of the source with the byte tokenizer."""
    data = DataConfig("jsonl", seq_len=8, path="rows", store_dir=str(stores), num_proc=num_proc)
    return build_store(data, source, tokenizer or ByteTokenizer(), data, val_fraction, report)
