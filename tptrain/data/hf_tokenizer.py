"""A tokenizer of the `tokenizers` library, from a tokenizer.json.

Texts become exactly the ids that the library gives for them, without the special tokens that it can add around a text. A
special token that is written out in a text (`<|endoftext|>`) becomes that token's id, as in the library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tptrain.config_error import refuse
from tptrain.files import write_atomically

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
"""The tokenizer itself."""
CONFIG_FILE = "tokenizer_config.json"
"""Beside it, as transformers has it: which token ends a text."""
_END_TOKENS = (
    "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[SEP]",
)  # fmt: skip
"""What common tokenizers end a text with, where none is named."""


class HFTokenizer:
    """Wraps `tokenizers.Tokenizer`; the arrays of ids are uint16 where the vocabulary fits, else uint32."""

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer, end_token: str) -> None:
        """Takes the tokenizer as its own, and makes it give all ids of a text: no cutting, no filling up, no random dropping.

        Raises ValueError for an end_token that is not in the vocabulary.
        """
        end_of_document = tokenizer.token_to_id(end_token)
        if end_of_document is None:
            raise ValueError(f"{end_token} is not in the vocabulary of {name}")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        self.name = name
        self.end_token = end_token
        self.end_of_document = end_of_document
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._tokenizer = tokenizer
        self._dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, uint16 or uint32 [n], with no end-of-document id. Raises UnicodeEncodeError for lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, on as many cores as the environment's TOKENIZERS_PARALLELISM lets the library take."""
        try:
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # what the library says of lone surrogates
            for text in texts:
                text.encode("utf-8")
            raise
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens and unknown ids are left out, and bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([number for number in map(int, ids) if 0 <= number < self.vocab_size], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Hash of the vocabulary, the rules and the end token, in hex digits."""
        return hashlib.sha256(f"{self._tokenizer.to_str()}\n{self.end_token}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and before it the tokenizer_config.json that names the end token; transformers reads both."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_token, "clean_up_tokenization_spaces": False}
        write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
        write_atomically(folder / FILE, self._tokenizer.to_str(pretty=True).encode())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.name, self._tokenizer.to_str(), self.end_token)


def _unpickle(name: str, text: str, end_token: str) -> HFTokenizer:
    from tokenizers import Tokenizer

    return HFTokenizer(name, Tokenizer.from_str(text), end_token)


def read_file(path: Path, name: str, end_token: str | None) -> HFTokenizer:
    """The tokenizer of a tokenizer.json, whose end token is the one given, else the one named beside it, else a common one.

    Raises ConfigError where the file cannot be read or no end token is found.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises no class of its own
        rule = f"stands for {path}, which is no tokenizer of the tokenizers library ({' '.join(str(error).split())[:200]})"
        raise refuse("data.tokenizer.name", name, rule, f"use a {FILE} as save_pretrained writes it") from error
    return HFTokenizer(name, tokenizer, _end_token(tokenizer, path, name, end_token))


def _end_token(tokenizer: tokenizers.Tokenizer, path: Path, name: str, asked: str | None) -> str:
    """The token that ends a document."""
    named = [asked] if asked is not None else [_named_beside(path), *_END_TOKENS]
    for token in named:
        if token is not None and tokenizer.token_to_id(token) is not None:
            return token
    special = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    listed = f"use one of its special tokens, {' '.join(special[:20])}" if special else "it has no special tokens: use one of its tokens"
    if asked is not None:
        raise refuse("data.tokenizer.end_token", asked, f"is not in the vocabulary of {name}", listed)
    raise refuse("data.tokenizer.name", name, "names no token that ends a text", f"{listed}, as data.tokenizer.end_token=...")


def _named_beside(path: Path) -> str | None:
    """The eos_token of the tokenizer_config.json beside a tokenizer.json, if there is one."""
    try:
        token = json.loads(path.with_name(CONFIG_FILE).read_text("utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
