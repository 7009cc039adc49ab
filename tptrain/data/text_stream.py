"""Token ids to text while they come, a piece at a time."""

from __future__ import annotations

from tptrain.data.tokenizers import ByteTokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes ids one by one. Bytes that may be the beginning of a character wait for the rest of it.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.push(number) for number in "é!".encode()], stream.flush()
    (['', 'é', '!'], '')
    """

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0
        """Characters of the ids' text that were handed out."""

    def push(self, number: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(number)
        text = self._tokenizer.decode(self._ids)
        waits = text.endswith(_UNKNOWN)  # as an incomplete character is decoded
        piece = text[self._given : len(text) - waits]
        self._given += len(piece)
        if not waits:
            self._ids, self._given = [], 0
        return piece

    def flush(self) -> str:
        """The rest, at the end: what still waits was never completed."""
        piece = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._given = [], 0
        return piece
