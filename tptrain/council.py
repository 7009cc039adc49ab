"""What the nodes of a job tell each other while no process group stands: before the ranks train, and after they have failed.

Each node has one speaker: the command that starts its ranks, or under torchrun the first of its ranks. They meet in a store on node 0,
where every node leaves what it has to say, and a beat a second as the sign of its life:

    says/config/1   what node 1 said under that name      beat/1   counts up      left/1   why it went

Whoever waits for a node waits as long as it lives: a data set may take hours to prepare. A node that leaves says why, and those who wait
for it end in the same way: refused, stopped or failed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tptrain.config import ConfigError
from tptrain.stop import Stopped
from tptrain.store_line import StoreLine, Unreachable

if TYPE_CHECKING:
    from torch.distributed import Store

_BEAT_SECONDS = 1.0
_FAREWELL_SECONDS = 10.0
"""How long node 0, which has the store, waits for the others to leave."""


class LostNode(RuntimeError):
    """A node is gone, or has failed. The message is one line."""

    def __init__(self, node: int, text: str) -> None:
        super().__init__(f"node {node} {text}")
        self.node = node
        self.farewell: dict[str, Any] = {"node": node, "kind": "failed", "text": text}


@dataclass(frozen=True)
class Patience:
    """How long a node may give no sign of life."""

    seconds: float
    since_last_sign: bool = False
    """Counted from the last sign, else from when the waiting begins."""


class Council:
    """One node's seat in it, to be used as a context manager: leaving it tells the others why."""

    def __init__(self, connect: Callable[[], Store], node: int, nodes: int, patience_seconds: float, listener: bool = False) -> None:
        """connect: makes a connection to the store. patience_seconds: how long a node may give no sign of life while it is waited for.

        listener: this process hears what is said, and the node's speaker is another.
        """
        self.node, self.nodes, self._patience = node, nodes, Patience(patience_seconds)
        self._listener = listener
        self._line, self._beats = StoreLine(connect), StoreLine(connect)
        self._over = threading.Event()
        self._pulses: dict[int, tuple[int, float]] = {}
        """How often a node's heart has beaten, and when that was last seen to change."""
        self._lost: set[int] = set()

    def __enter__(self) -> Council:
        if not self._listener:
            threading.Thread(target=self._beat, name="beat", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._over.set()
        if self._listener or 0 in self._lost:
            return
        farewell = getattr(error, "farewell", None) or _farewell(self.node, error)
        self.mark(lambda store: store.set(f"left/{self.node}", json.dumps(farewell)))
        if self.node == 0:
            self._see_off()

    def say(self, name: str, value: Any, patience: Patience | None = None) -> None:
        """Leave what JSON can hold under `name`, for all. Raises LostNode where node 0 cannot be reached for so long."""
        text, key, patience = json.dumps(value), f"says/{name}/{self.node}", patience or self._patience
        _, seen = self._watch(0, patience)
        while True:
            try:
                return self._line.do(lambda store: _put(store, key, text))
            except Unreachable as error:
                if time.monotonic() - seen > patience.seconds:
                    raise self._lose(0, patience) from error
            time.sleep(0.2)

    def hear(self, node: int, name: str, patience: Patience | None = None) -> Any:
        """What a node says under `name`, once it does.

        Raises LostNode where it gives no sign of life for so long or has failed, ConfigError where it refused, Stopped where it was
        stopped.
        """
        patience, pause = patience or self._patience, 0.02
        pulse, seen = self._watch(node, patience)

        def ask(store: Store) -> tuple[bytes | None, bytes | None, int]:
            # In this order: what a node had to say, it said before it left.
            left, said = (store.get(key) if store.check([key]) else None for key in (f"left/{node}", f"says/{name}/{node}"))
            return said, left, store.add(f"beat/{node}", 0)

        while True:
            with contextlib.suppress(Unreachable):
                said, left, beat = self._line.do(ask)
                if said is not None:
                    self._pulses[node] = beat, time.monotonic()
                    return json.loads(said)
                if left is not None:
                    raise _as_error(json.loads(left))
                if beat != pulse:
                    pulse, seen = beat, time.monotonic()
            if time.monotonic() - seen > patience.seconds:
                raise self._lose(node, patience)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def together(self, name: str, part: Callable[[], Any] = lambda: None) -> Any:
        """Every speaker does its part, and goes on once all have: with node 0's value, on every node.

        Raises what the part raises, and on the other nodes what `hear` raises for it.
        """
        value = None
        if not self._listener:
            value = part()
            self.say(name, value)
        if self.node == 0 and not self._listener:
            for node in range(1, self.nodes):
                self.hear(node, name)
            self.say(f"{name}/all", value)
        return self.hear(0, f"{name}/all")

    def mark(self, operation: Callable[[Store], Any]) -> None:
        """Do something on the store; passed over where it cannot be reached."""
        with contextlib.suppress(Unreachable):
            self._line.do(operation)

    def _watch(self, node: int, patience: Patience) -> tuple[int, float]:
        """A node's last known pulse, and since when it counts as silent."""
        count, seen = self._pulses.get(node, (-1, time.monotonic()))
        return count, seen if patience.since_last_sign else time.monotonic()

    def _lose(self, node: int, patience: Patience) -> LostNode:
        self._lost.add(node)
        return LostNode(node, f"has given no sign of life for {patience.seconds:g} s")

    def _beat(self) -> None:
        """In a thread: give signs of life, and look for those of the others, which for all but node 0 is node 0 alone."""
        others = range(1, self.nodes) if self.node == 0 else range(1)

        def beat(store: Store) -> list[int]:
            store.add(f"beat/{self.node}", 1)
            return [store.add(f"beat/{other}", 0) for other in others]

        while not self._over.wait(_BEAT_SECONDS):
            with contextlib.suppress(Unreachable):
                for other, count in zip(others, self._beats.do(beat), strict=True):
                    if self._pulses.get(other, (-1, 0.0))[0] != count:
                        self._pulses[other] = count, time.monotonic()

    def _see_off(self) -> None:
        """Keep the store until the others have read what they need."""
        end = time.monotonic() + _FAREWELL_SECONDS
        others = [f"left/{node}" for node in range(1, self.nodes) if node not in self._lost]
        with contextlib.suppress(Unreachable):
            while time.monotonic() < end and not self._line.do(lambda store: store.check(others)):
                time.sleep(0.05)


def _put(store: Store, key: str, text: str) -> None:
    store.set(key, text)
    store.check([key])  # which is answered, unlike a set


def _farewell(node: int, error: BaseException | None) -> dict[str, Any]:
    """Why a node goes, for those who wait for it."""
    if isinstance(error, ConfigError):
        return {"node": node, "kind": "refused", "text": str(error)}
    if isinstance(error, Stopped):
        return {"node": node, "kind": "stopped", "text": str(error)}
    text = "has ended" if error is None else " ".join(f"has failed: {error or type(error).__name__}".split())
    return {"node": node, "kind": "failed", "text": text}


def _as_error(farewell: dict[str, Any]) -> BaseException:
    """The error that a farewell brings about elsewhere; who leaves by it passes the same farewell on."""
    node, text = farewell["node"], farewell["text"]
    error: BaseException = LostNode(node, text)
    if farewell["kind"] == "refused":
        error = ConfigError(f"node {node}: {text}")
    if farewell["kind"] == "stopped":
        error = Stopped(f"node {node} was {text}")
    error.farewell = farewell  # type: ignore[attr-defined]
    return error
