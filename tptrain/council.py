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
from typing import Any

from torch.distributed import Store

from tptrain.config import ConfigError
from tptrain.stop import Stopped
from tptrain.store_line import StoreLine, Unreachable

_BEAT_SECONDS = 1.0
_FAREWELL_SECONDS = 10.0
"""How long node 0, which has the store, waits for the others to leave."""


class LostNode(RuntimeError):
    """A node is gone, or has failed. The message is one line."""

    def __init__(self, node: int, text: str) -> None:
        super().__init__(f"node {node} {text}")
        self.node = node
        self.farewell: dict[str, Any] = {"node": node, "kind": "failed", "text": text}


class Council:
    """One node's seat in it, to be used as a context manager: leaving it tells the others why."""

    def __init__(self, connect: Callable[[], Store], node: int, nodes: int, patience_seconds: float, listener: bool = False) -> None:
        """connect: makes a connection to the store. patience_seconds: how long a node may give no sign of life.

        listener: this process hears what is said, and the node's speaker is another.
        """
        self.node, self.nodes, self.patience_seconds = node, nodes, patience_seconds
        self._listener = listener
        self._line, self._beats = StoreLine(connect), StoreLine(connect)
        self._over = threading.Event()
        self._lost: set[int] = set()

    def __enter__(self) -> Council:
        if not self._listener:
            threading.Thread(target=self._beat, name="beat", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._listener:
            return
        farewell = getattr(error, "farewell", None) or _farewell(self.node, error)
        with contextlib.suppress(Unreachable):
            self._line.do(lambda store: store.set(f"left/{self.node}", json.dumps(farewell)))
            if self.node == 0:
                self._see_off()
        self._over.set()

    def say(self, name: str, value: Any, patience_seconds: float | None = None) -> None:
        """Leave what JSON can hold under `name`, for all. Raises LostNode where the store cannot be reached for so long."""
        text, key = json.dumps(value), f"says/{name}/{self.node}"

        def put(store: Store) -> bool:
            store.set(key, text)
            return store.check([key])  # which is answered, unlike a set

        self._keep_trying(put, patience_seconds)

    def hear(self, node: int, name: str, patience_seconds: float | None = None) -> Any:
        """What a node says under `name`, once it does.

        Raises LostNode where it gives no sign of life for so long or has failed, ConfigError where it refused, Stopped where it was
        stopped.
        """
        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        pulse, seen, pause = -1, time.monotonic(), 0.02

        def ask(store: Store) -> tuple[bytes | None, bytes | None, int]:
            said, left = (store.get(key) if store.check([key]) else None for key in (f"says/{name}/{node}", f"left/{node}"))
            return said, left, store.add(f"beat/{node}", 0)

        while True:
            with contextlib.suppress(Unreachable):
                said, left, beat = self._line.do(ask)
                if said is not None:
                    return json.loads(said)
                if left is not None:
                    raise _as_error(json.loads(left))
                if beat != pulse:
                    pulse, seen = beat, time.monotonic()
            if time.monotonic() - seen > patience:
                self._lost.add(node)
                raise LostNode(node, f"has given no sign of life for {patience:g} s")
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

    def _keep_trying(self, operation: Callable[[Store], Any], patience_seconds: float | None) -> None:
        patience, began = self.patience_seconds if patience_seconds is None else patience_seconds, time.monotonic()
        while True:
            try:
                self._line.do(operation)
                return
            except Unreachable as error:
                if time.monotonic() - began > patience:
                    raise LostNode(0, f"cannot be reached for {patience:g} s: {error}") from error
            time.sleep(0.2)

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            with contextlib.suppress(Unreachable):
                self._beats.do(lambda store: store.add(f"beat/{self.node}", 1))

    def _see_off(self) -> None:
        """Keep the store until the others have read what they need."""
        end = time.monotonic() + _FAREWELL_SECONDS
        others = [f"left/{node}" for node in range(1, self.nodes) if node not in self._lost]
        while time.monotonic() < end and not self._line.do(lambda store: store.check(others)):
            time.sleep(0.05)


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
