"""Token ids to text while they come, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable

from tptrain.data.tokenizers import Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WAIT = 3
"""Of a character's four bytes, how many may come before the rest; a decoder may show each of them as one U+FFFD."""


class TextStream:
    """Decodes ids one by one. Bytes that may be the beginning of a character wait for the rest of it.

    Ids are decoded together with the piece before them, as some decoders drop a blank that their text begins with.

    >>> from tptrain.data.tokenizers import ByteTokenizer
    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.push(number) for number in "é!".encode()], stream.flush()
    (['', 'é', '!'], '')
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()) -> None:
        """before: the ids of the text that this one goes on from; it is not given out again."""
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._given = len(tokenizer.decode(self._ids))
        """Characters of the ids' text that are known already."""
        self._new = len(self._ids)
        """The first of the ids that no complete piece has used."""

    def push(self, number: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(number)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(_UNKNOWN)
        if len(whole) == len(text):
            return self._end_piece(text)
        if len(self._ids) - self._new <= _LONGEST_WAIT:
            return ""
        piece = text[self._given : max(len(whole), len(text) - _LONGEST_WAIT)]  # what was never completed before these
        self._given += len(piece)
        return piece

    def flush(self) -> str:
        """The rest, at the end: what still waits was never completed."""
        return self._end_piece(self._tokenizer.decode(self._ids))

    def _end_piece(self, text: str) -> str:
        """The characters that are new in `text`, the whole text of the ids. What follows is decoded from here on."""
        piece = text[self._given :]
        if piece:
            self._ids = self._ids[self._new :]
            self._given = len(self._tokenizer.decode(self._ids))
            self._new = len(self._ids)
        return piece
