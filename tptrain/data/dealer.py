"""A stream of documents, dealt out to lanes round by round.

A round is so many documents that each of the n lanes gets one block of them, every n-th document to the same lane:

    stream      0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13       2 lanes, blocks of 3 documents
    lane 0      0   2   4   | 6   8   10    | 12          the last round of an epoch may be short
    lane 1        1   3   5 |   7   9    11 |    13

The stream is read once for all lanes of a reader: what another lane will ask for waits for it. A round begins at a state that `datasets`
gives and takes back (`state_dict`, `load_state_dict`), so that reading starts there again, after a resume or a lost connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tptrain.config_error import ConfigError, refuse
from tptrain.data.documents import bad_field, kind_of

if TYPE_CHECKING:
    import datasets

Round = tuple[int, int]
"""Epoch, and the round's number in it."""
State = dict[str, Any]
"""What `datasets` needs to read on, as JSON; empty at the start of an epoch."""

_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before the next try after a lost connection. `datasets` has by then tried on its own to go on reading, for minutes."""
_WAITING_CHARACTERS = 1 << 28
"""Text that may wait for lanes that are behind. What goes beyond is dropped, and read again when it is asked for."""
_KNOWN_STARTS = 256
_NETWORK_PACKAGES = {"httpx", "httpcore", "aiohttp", "requests", "urllib3", "fsspec", "huggingface_hub"}


class Dealer:
    """The blocks of some lanes from one stream, without end: after the last round of an epoch comes the first of the next.

    stream: rows with `column`, in the same order each time. lanes: how many it is dealt to. block: documents that a lane gets in a round.
    name: of the stream, for messages. first_row: number of its first row, for messages. report: called with a line on each lost connection.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        column: str,
        lanes: int,
        block: int,
        name: str,
        first_row: int = 0,
        report: Callable[[str], None] = print,
    ) -> None:
        self._stream, self._column, self._lanes, self._block = stream, column, lanes, block
        self._name, self._first_row, self._report = name, first_row, report
        self._batches: Iterator[dict[str, list[object]]] | None = None
        self._at: Round = (0, 0)
        """What `_batches` gives next."""
        self._starts: dict[Round, State] = {}
        self._rounds: int | None = None
        """In an epoch; known once one has ended."""
        self._next: dict[int, Round] = {}
        """What each lane that takes part asks for next."""
        self._waiting: dict[tuple[Round, int], list[str]] = {}
        self._waiting_characters = 0

    def expect(self, lane: int, next_round: Round, start: State | None = None) -> None:
        """Lane `lane` takes part from `next_round` on. start: the stream's state there, if it is known."""
        self._next[lane] = next_round
        for passed in [key for key in self._waiting if key[1] == lane and key[0] < next_round]:
            self._take(passed)
        if start:
            self._starts[next_round] = start

    def start(self, wanted: Round) -> State | None:
        """The stream's state where round `wanted` starts, if it is known."""
        return {} if wanted[1] == 0 else self._starts.get(wanted)

    def block(self, lane: int, wanted: Round) -> list[str]:
        """The texts that `lane` gets in a round, in the stream's order; none where the epoch has no document for it there.

        Raises ConfigError for a row without text, and where the stream cannot be read.
        """
        self._next[lane] = (wanted[0], wanted[1] + 1)
        if (wanted, lane) in self._waiting:
            return self._take((wanted, lane))
        if self._rounds is not None and wanted[1] >= self._rounds:
            return []
        self._open_near(wanted)
        while True:
            now, texts = self._at, self._read_round()
            for other, next_round in self._next.items():
                if now >= next_round and other != lane:
                    self._let_wait(now, other, texts[other :: self._lanes])
            if now == wanted:
                return texts[lane :: self._lanes]
            if self._at[0] > wanted[0]:  # the epoch ended before
                return []

    def _take(self, key: tuple[Round, int]) -> list[str]:
        texts = self._waiting.pop(key)
        self._waiting_characters -= sum(map(len, texts))
        return texts

    def _let_wait(self, at: Round, lane: int, texts: list[str]) -> None:
        size = sum(map(len, texts))
        if (at, lane) not in self._waiting and self._waiting_characters + size <= _WAITING_CHARACTERS:
            self._waiting[at, lane] = texts
            self._waiting_characters += size

    def _open_near(self, wanted: Round) -> None:
        """Go to the last known start that is not beyond `wanted`, unless the reader stands between the two already."""
        epoch_start = (wanted[0], 0)
        known = max((at for at in self._starts if epoch_start <= at <= wanted), default=epoch_start)
        if self._batches is None or not known <= self._at <= wanted:
            self._at, self._batches = known, None

    def _read_round(self) -> list[str]:
        """The texts of the round that is next; a lost connection is tried again."""
        for pause in (*_PAUSES_SECONDS, None):
            try:
                texts = self._texts(self._next_batch())
                break
            except ConfigError:
                self._batches = None  # asked again, it says so again
                raise
            except Exception as error:  # whatever a reader of any format raises
                self._batches = None
                if pause is None or not is_network_error(error):
                    raise unreadable(self._name, self._first_row + self._at[1] * self._lanes * self._block, error) from error
                self._report(f"{self._name}: {_short(error)}; trying again in {pause:g} s")
                time.sleep(pause)
        epoch, number = self._at
        if len(texts) < self._lanes * self._block:
            self._rounds = number + bool(texts)
            self._at, self._batches = (epoch + 1, 0), None
        else:
            self._at = (epoch, number + 1)
            self._starts.pop(self._at, None)  # the newest stands last
            self._starts[self._at] = self._stream.state_dict()
            if len(self._starts) > _KNOWN_STARTS:
                del self._starts[next(iter(self._starts))]
        return texts

    def _next_batch(self) -> dict[str, list[object]] | None:
        if self._batches is None:
            self._stream.load_state_dict(self._starts[self._at] if self._at[1] else {})
            self._batches = self._stream.iter(batch_size=self._lanes * self._block)
        return next(self._batches, None)

    def _texts(self, batch: dict[str, list[object]] | None) -> list[str]:
        """The column of a batch; nothing of none. Raises ConfigError, with the row and the columns that exist, where there is no text."""
        if not batch:
            return []
        rows = batch.get(self._column)
        if rows is not None and all(isinstance(text, str) for text in rows):
            return rows  # type: ignore[return-value]
        place = next((place for place, text in enumerate(rows) if not isinstance(text, str)), 0) if rows is not None else 0
        row = self._first_row + self._at[1] * self._lanes * self._block + place + 1
        fault = "is missing" if rows is None else f"is {kind_of(rows[place])}"
        raise bad_field("data", self._column, fault, f"{self._name}, row {row}", batch)


def unreadable(name: str, row: int, error: Exception) -> ConfigError:
    """The refusal of the stream `name` that gave `row` rows and then an error of its reader."""
    if is_network_error(error):
        remedy = "start the run again when the network is back, and it goes on from its last checkpoint"
        return refuse("data.streaming", True, f"lost its connection after row {row} of {name} ({_short(error)})", remedy)
    return refuse("data.streaming", True, f"cannot read {name} after row {row} ({_short(error)})", "repair or leave out that file")


def is_network_error(error: BaseException) -> bool:
    """Whether an error, or one that it grew from, is of a connection, so that trying again may help."""
    link: BaseException | None = error
    while link is not None:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:  # an answer came: 429 asks to wait, from 500 on the server is in trouble
            return status == 429 or status >= 500
        if isinstance(link, (ConnectionError, TimeoutError)):
            return True
        if type(link).__module__.partition(".")[0] in _NETWORK_PACKAGES and not isinstance(link, (FileNotFoundError, ValueError)):
            return True
        link = link.__cause__ or link.__context__
    return False


def _short(error: BaseException) -> str:
    """An error and the one that it grew from, in one line of at most 300 characters."""
    links = [error] if error.__cause__ is None else [error, error.__cause__]
    return "; ".join(f"{type(link).__name__}: {' '.join(str(link).split())}" for link in links)[:300]
