"""Text to token ids and back.

A tokenizer has `name`, `vocab_size` (ids are below it), `end_of_document` (the id that follows each document), `encode`
and `decode`. The byte tokenizer needs no vocabulary file, so it works on any machine: one id a UTF-8 byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from tptrain.config import DataConfig


class Tokenizer(Protocol):
    """Text to ids and back."""

    name: str
    vocab_size: int
    end_of_document: int

    def encode(self, text: str) -> np.ndarray:
        """Ids [n]."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` finds there."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8 text, and 256 ends a document.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    """

    name = "byte"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, uint16 [bytes], with no end-of-document id. Raises UnicodeEncodeError for lone surrogates."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def save(self, folder: Path) -> None:
        """Nothing: it has no vocabulary file."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: what is no byte is left out, and bytes that are not UTF-8 become U+FFFD."""
        return bytes(number for number in map(int, ids) if 0 <= number < 256).decode("utf-8", errors="replace")


def load_tokenizer(data: DataConfig) -> ByteTokenizer | None:
    """The tokenizer that `data` names, or None for memorize, whose ids stand for no text. Raises ValueError for an unknown name."""
    if data.source == "memorize":
        return None
    if data.tokenizer.name == "byte":
        return ByteTokenizer()
    raise ValueError(f"no tokenizer is called {data.tokenizer.name!r}")
