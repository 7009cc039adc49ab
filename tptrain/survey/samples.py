"""Samples of a run as text that any terminal can show."""

from __future__ import annotations

import numpy as np

from tptrain.data.tokenizers import Tokenizer

END = "[end]"
"""Stands where a document ends."""


def sample_text(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """The text of a sample's ids [n], with END after each document; the numbers themselves where they stand for no text."""
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    ends = np.flatnonzero(ids == tokenizer.end_of_document)
    pieces = np.split(ids, ends + 1)
    whole, rest = pieces[:-1], pieces[-1]
    return "".join(tokenizer.decode(piece[:-1]) + END for piece in whole) + tokenizer.decode(rest)


def shown(text: str, most: int, encoding: str = "utf-8") -> str:
    r"""At most `most` characters of `text` and `...` where there are more, without what would move a cursor or change a colour.

    encoding: of the terminal; what it has not is written by its number, as are characters that print nothing.

    >>> print(shown("a\tb\x1b[31m \\n é", 20, "ascii"))
    a\tb\x1b[31m \\n \xe9
    """
    cut = text[:most] + "..." * (len(text) > most)
    safe = "".join(letter if letter.isprintable() and letter != "\\" else _escaped(letter) for letter in cut)
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
