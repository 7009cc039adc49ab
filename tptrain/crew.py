"""The commands of several nodes, each of which starts its own ranks: `tptrain launch.nodes=4 launch.node_rank=I launch.master=HOST`.

    node 0: tptrain ── store on HOST:PORT ── node 1: tptrain ── node 2 ...
              │              │                     │
           its ranks ────────┴──────────────── its ranks              they find each other in the same store, and then speak directly

The ranks of a node are its command's alone: it starts them, and they die with it. How an attempt ended is put together from what all
nodes saw; node 0 decides on it, so that all start again, or stop, or fail with the same cause.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tptrain import network
from tptrain.config import Config, refuse
from tptrain.council import Council, LostNode, Patience
from tptrain.failures import Outcome, say
from tptrain.job import Meeting
from tptrain.launch_config import LaunchConfig, split_master
from tptrain.roll_call import FELL, store_of_attempt

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

_CONNECT = timedelta(seconds=5)
_PATIENCE_SECONDS = 10.0
"""How long another node may have given no sign of life when the ranks have failed, where there is no restart to wait for."""


class Crew:
    """This node's command among those of the other nodes."""

    def __init__(self, config: Config, council: Council, host: str, port: int, interface: str | None) -> None:
        self.council, self.interface = council, interface
        """The name of the network interface that leads to the other nodes."""
        self._config, self._host, self._port = config, host, port
        self._attempt = -1
        self.without: LostNode | None = None
        """The node that gave no sign of life when the last attempt was put together; nothing can be started again."""

    @property
    def reports(self) -> bool:
        """Whether this node writes the run's state: node 0, or any that has lost node 0."""
        return self.council.node == 0 or (self.without is not None and self.without.node == 0)

    def begin(self) -> Meeting:
        """Begin an attempt once all nodes are there."""
        self._attempt += 1
        council = self.council
        council.together(f"start {self._attempt}")
        here = self._config.processes // council.nodes
        return Meeting(self._host, self._port, self._attempt, council.node * here, self._config.processes)

    def fell(self) -> None:
        """Let ranks of other nodes that still look for ours know that these will not come."""
        council, attempt = self.council, self._attempt
        council.mark(lambda store: store_of_attempt(store, attempt).set(FELL, str(council.node)))

    def conclude(self, outcome: Outcome, judge: Callable[[Outcome], dict[str, Any]], again: bool) -> dict[str, Any]:
        """What node 0 makes of all nodes' outcomes by `judge`, on every node. again: whether the ranks could be started again.

        A node that cannot be reached is left out, and is then `without`; node 0's own absence lets each node judge for itself.
        """
        council, name = self.council, f"end {self._attempt}"
        limit = self._config.launch.timeout_seconds
        patience = Patience(limit) if again else Patience(min(_PATIENCE_SECONDS, limit), since_last_sign=True)
        try:
            council.say(name, asdict(outcome), patience)
            if council.node > 0:
                end: dict[str, Any] = council.hear(0, f"{name}/all", patience)
                return end
        except LostNode as lost:
            self.without = lost
            return judge(outcome)
        for node in range(1, council.nodes):
            try:
                told = council.hear(node, name, patience)
            except LostNode as lost:
                self.without = lost
                continue
            outcome.exits |= {int(rank): (code, seen) for rank, (code, seen) in told["exits"].items()}
            outcome.asked = outcome.asked or told["asked"]
        end = judge(outcome)
        council.say(f"{name}/all", end)
        return end


@contextlib.contextmanager
def meet(config: Config) -> Iterator[Crew]:
    """Take this node's seat among the others of a resolved config, and give it up with what ends the block.

    Raises ConfigError where launch.master cannot be what it says, LostNode where nobody answers in time.
    """
    from torch.distributed import TCPStore

    launch = config.launch
    node, master = launch.node_rank, launch.master
    assert node is not None
    assert master is not None
    host, port = split_master(master)
    address, own = _addresses(host, master)
    server = _listen(launch, address, own, port) if node == 0 else None  # for as long as this lives

    def connect() -> Store:
        return TCPStore(address, port, None, False, timeout=_CONNECT)

    say(f"tptrain: node {node} of {launch.nodes} meets the others at {address}:{port}")
    with Council(connect, node, launch.nodes, launch.timeout_seconds) as council:
        if node > 0:
            council.say("address", address)
        else:  # whose own name for itself may be 127.0.1.1
            own = council.hear(1, "address")
        yield Crew(config, council, address, port, network.interface_of(own) or network.interface_to(host))
    del server


def _addresses(host: str, master: str) -> tuple[str, str]:
    """The address of launch.master, and this machine's own on the way there. Raises ConfigError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]), network.own_address(host)
    except OSError as error:
        rule = f"cannot be found from here ({error.strerror})"
        raise refuse("launch.master", master, rule, "use a name or an address of node 0 that every node can reach") from error


def _listen(launch: LaunchConfig, address: str, own: str, port: int) -> TCPStore:
    """The store in which the nodes meet, served by this process. Raises ConfigError."""
    from torch.distributed import TCPStore

    if own != address and not network.is_loopback(own):
        rule = f"leads to {address}, but node 0 is this machine, {own}"
        raise refuse("launch.master", launch.master, rule, f"use launch.master={own} on every node, or another launch.node_rank here")
    try:
        return TCPStore(address, port, None, True, timeout=_CONNECT, wait_for_workers=False)
    except RuntimeError as error:
        rule = f"cannot be listened on ({str(error).splitlines()[0]})"
        raise refuse("launch.master", launch.master, rule, f"use another port, as in {address}:{port + 1}") from error
