"""Text to token ids and back.

byte      one id a UTF-8 byte; needs no file, so it works on any machine      here
train     a byte-level BPE learned from the run's own text                    train_tokenizer
else      a Hugging Face tokenizer, by folder, file or hub name               hf_tokenizer, hub_tokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from tptrain.config_error import refuse
from tptrain.data.hf_tokenizer import CONFIG_FILE, FILE, HFTokenizer, read_file
from tptrain.data.hub_tokenizer import fetch
from tptrain.data_config import DataConfig, TokenizerConfig


class Tokenizer(Protocol):
    """Text to ids and back. Pickles, for worker processes, and takes its texts one core at a time there."""

    @property
    def name(self) -> str:
        """For messages: `the {name} tokenizer`."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it: the highest id, those of special tokens included, and 1."""

    @property
    def end_of_document(self) -> int:
        """The id that follows each document."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint16 or uint32 [n], with no end-of-document id. Raises UnicodeEncodeError for lone surrogates."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: ids that stand for no text are left out, and bytes that are not UTF-8 become U+FFFD."""

    def fingerprint(self) -> str:
        """Hash of all that the ids follow from, in hex digits."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` finds in a folder, each file whole or not at all; the byte tokenizer writes nothing."""


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

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: what is no byte is left out, and bytes that are not UTF-8 become U+FFFD."""
        return bytes(number for number in map(int, ids) if 0 <= number < 256).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """Always the same: the ids follow from UTF-8."""
        return hashlib.sha256(b"byte").hexdigest()

    def save(self, folder: Path) -> None:
        """Nothing to write."""


def load_tokenizer(data: DataConfig, folder: Path | None = None) -> Tokenizer | None:
    """The tokenizer that `data` names, or None where its ids stand for no text (memorize).

    folder: of a store or a run; a tokenizer that was saved there comes before what the name stands for now.
    Raises ConfigError where there is no such tokenizer, where it has no token to end a document with, or where the one in
    `folder` cannot be what `data` asks for.
    """
    asked = data.tokenizer
    if data.source == "memorize" or (data.source == "mixture" and all(part.source == "memorize" for part in data.mixture.values())):
        return None
    if asked.name == "byte":
        if asked.end_token is not None:
            raise refuse("data.tokenizer.end_token", asked.end_token, "names a token, and the byte tokenizer has none", "leave it away")
        return ByteTokenizer()
    if folder is not None and (folder / FILE).is_file():
        return _saved(asked, folder / FILE)
    if asked.name == "train":
        where, remedy = "is not trained yet", "start a training, which trains it"
        if folder is not None:
            where, remedy = f"is not in {folder}", f"copy {FILE} and {CONFIG_FILE} there, from the run's token store"
        raise refuse("data.tokenizer.name", "train", f"asks for a tokenizer that {where}", remedy)
    return read_file(_find(asked), asked.name, asked.end_token)


def _saved(asked: TokenizerConfig, path: Path) -> HFTokenizer:
    """The tokenizer of a store or run folder."""
    trained = asked.name == "train"
    tokenizer = read_file(path, "trained" if trained else asked.name, asked.end_token)
    if trained and tokenizer.vocab_size > asked.vocab_size:
        raise refuse("data.tokenizer.vocab_size", asked.vocab_size, f"is below the {tokenizer.vocab_size} ids of {path}",
                     "use the value that it was trained with")  # fmt: skip
    return tokenizer


def _find(asked: TokenizerConfig) -> Path:
    """The tokenizer.json of a tokenizer that is named by a folder, a file or its hub name. Raises ConfigError."""
    path = Path(asked.name).expanduser()
    if path.is_dir():
        if not (path / FILE).is_file():
            remedy = "save it there with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            raise refuse("data.tokenizer.name", asked.name, f"is a folder without a {FILE}", remedy)
        return path / FILE
    if path.exists():
        return path
    if asked.name.startswith((".", "/", "~")) or asked.name.endswith(".json") or asked.name.count("/") > 1:
        rule = f"does not exist (from {Path.cwd()})"
        raise refuse("data.tokenizer.name", asked.name, rule, f"use byte, train, a folder with a {FILE}, such a file or a hub name")
    return fetch(asked.name, asked.revision)
