"""One lane of a stream: its documents in a mixed order, as one run of tokens that is cut into windows.

    blocks      [d0 d1 d2] [d3 d4 d5] ...        as a `Dealer` hands them out, epoch after epoch
    mixed       [d2 d0 d1] [d3 d5 d4] ...        each by a key of (seed, epoch, lane, block)
    tokens      d2 end d0 end d1 end d3 ...      one run, across blocks and epochs
    windows     |--- 0 ---|--- 1 ---|            seq_len + 1 tokens that share one with the next, as those of `Sampler`

A mark says which document starts at which token of the run. A lane goes on exactly from any mark before the token that is wanted: it
tokenises from there on and drops what comes before.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tptrain.config_error import refuse
from tptrain.data.dealer import Dealer, State
from tptrain.data.sampler import permute
from tptrain.data.tokenizers import Tokenizer
from tptrain.data_config import DataConfig

_PIECE_CHARACTERS = 1 << 18
"""About so much text is tokenised at a time."""
_FAR_TOKENS = 1 << 22
"""Reading on over more than so many tokens takes seconds, and is reported."""


@dataclass(frozen=True)
class Mark:
    """Token `token` of a lane's run is the first of document `document`, in the mixed order, of block `block` of epoch `epoch`."""

    token: int
    epoch: int
    block: int
    document: int
    start: State
    """The stream's state where the block's round starts."""


class Lane:
    """Windows of one lane by their number in it.

    number: of all lanes; place: among the dealer's. report: called with a line where reading goes over much text that nobody asked for.
    """

    def __init__(
        self,
        dealer: Dealer,
        number: int,
        place: int,
        tokenizer: Tokenizer,
        data: DataConfig,
        seed: int,
        report: Callable[[str], None] = print,
    ) -> None:
        self._dealer, self._number, self._place = dealer, number, place
        self._tokenizer, self._seq_len, self._lanes = tokenizer, data.seq_len, data.stream_lanes
        self._seed, self._report = seed, report
        self._end = np.array([tokenizer.end_of_document], dtype=np.int32)
        self._marks = [Mark(0, 0, 0, 0, {})]
        """In the order of their tokens. Replaced, not changed, but for appending: another thread may be looking."""
        self._tokens = [np.empty(0, dtype=np.int32)]
        self._first = self._head = 0
        """`_tokens` holds the run's tokens from `_first` up to `_head`."""
        self._epoch = self._block = self._document = 0
        """What is tokenised next."""
        self._texts: list[str] | None = None
        """The block's documents in the mixed order; None: not read yet."""
        dealer.expect(place, (0, 0))

    def rows(self, first: int, count: int) -> np.ndarray:
        """Windows first .. first + count - 1, int32 [count, seq_len + 1]. Raises ConfigError where the stream cannot be read."""
        begin, end = first * self._seq_len, (first + count) * self._seq_len + 1
        if begin < self._first or self.mark(begin).token > self._head:
            self._go_to(self.mark(begin))
        if begin - self._head > _FAR_TOKENS:
            self._report(f"stream: no nearer state is known, so lane {self._number} reads on from its token {self._head} to {begin}")
        while self._head < end:
            if self._head < begin:
                self._tokens, self._first = [], self._head
            self._read_piece()
        tokens = np.concatenate(self._tokens)[begin - self._first :] if len(self._tokens) > 1 else self._tokens[0][begin - self._first :]
        self._tokens, self._first = [tokens], begin
        return np.lib.stride_tricks.sliding_window_view(tokens[: end - begin], self._seq_len + 1)[:: self._seq_len]

    # ---- marks -----------------------------------------------------------------------------------------------

    def mark(self, token: int) -> Mark:
        """The last known mark that is not beyond a token."""
        marks = self._marks
        return marks[max(0, bisect_right(marks, token, key=lambda mark: mark.token) - 1)]

    def add(self, mark: Mark) -> None:
        """Make a mark known that this or another reader of the same lane made."""
        self._marks = sorted({known.token: known for known in (*self._marks, mark)}.values(), key=lambda known: known.token)
        self._dealer.expect(self._place, (mark.epoch, mark.block), mark.start)

    def forget(self, token: int) -> None:
        """Drop the marks that nobody needs who asks for nothing before a token. The lane's start stays known."""
        needed = self.mark(token).token
        self._marks = [mark for mark in self._marks if mark.token >= needed or mark.token == 0]

    def _go_to(self, mark: Mark) -> None:
        self._tokens, self._first, self._head = [np.empty(0, dtype=np.int32)], mark.token, mark.token
        self._epoch, self._block, self._document, self._texts = mark.epoch, mark.block, mark.document, None
        self._dealer.expect(self._place, (mark.epoch, mark.block), mark.start)

    # ---- from text to tokens ---------------------------------------------------------------------------------

    def _read_piece(self) -> None:
        """Append the tokens of the next documents."""
        if self._texts is None:
            self._texts = self._next_block()
        start = self._dealer.start((self._epoch, self._block))
        if start is not None and self._head > self._marks[-1].token:
            self._marks.append(Mark(self._head, self._epoch, self._block, self._document, start))
        texts, characters = [], 0
        while self._document < len(self._texts) and characters < _PIECE_CHARACTERS:
            texts.append(self._texts[self._document])
            characters += len(texts[-1]) + 1
            self._document += 1
        ids = np.concatenate([part for ids in self._tokenizer.encode_batch(texts) for part in (ids, self._end)], dtype=np.int32)
        self._tokens.append(ids)
        self._head += len(ids)
        if self._document == len(self._texts):
            self._block, self._document, self._texts = self._block + 1, 0, None

    def _next_block(self) -> list[str]:
        """The next block that has documents, in the mixed order."""
        texts = self._dealer.block(self._place, (self._epoch, self._block))
        if not texts and self._block:
            self._epoch, self._block = self._epoch + 1, 0
            texts = self._dealer.block(self._place, (self._epoch, 0))
        if not texts:
            rule = f"leaves lane {self._number} without a document: the stream has too few"
            raise refuse("data.stream_lanes", self._lanes, rule, "use a smaller data.stream_lanes, or data.streaming=false")
        order = permute(np.arange(len(texts)), len(texts), block_key(self._seed, self._epoch, self._number, self._block))
        return [texts[place] for place in order]


def block_key(seed: int, epoch: int, lane: int, block: int) -> int:
    """The 64-bit key of one block's order."""
    return int.from_bytes(hashlib.blake2b(f"stream/{seed}/{epoch}/{lane}/{block}".encode(), digest_size=8).digest(), "little")
