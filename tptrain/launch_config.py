"""The schema of the group `launch`, and the checks of its own values."""

from __future__ import annotations

from dataclasses import dataclass

from tptrain.config_error import refuse

DEFAULT_PORT = 29500


@dataclass
class LaunchConfig:
    """How ranks are started."""

    threads_per_rank: int | str
    """CPU threads a rank computes with, or auto: the cores shared evenly by the ranks of the machine."""
    timeout_seconds: float
    """Longest wait for another rank before the job ends with an error."""
    stop_seconds: float = 600.0
    """How long ranks may take to finish a step and save once a signal came, before they are killed."""
    nodes: int = 1
    """Machines of the job, on each of which this command is started; under torchrun and the like 1."""
    node_rank: int | None = None
    """Which of them this one is, from 0. Node 0 prepares the data and reports."""
    master: str | None = None
    """HOST or HOST:PORT of node 0, where the nodes meet; the port is 29500 unless given, and has to be free there."""
    processes_per_node: int | str = "auto"
    """Ranks on each node, or auto: its GPUs, on CPU the processes of the layout shared evenly."""


def check_launch(launch: LaunchConfig) -> None:
    """Whether the group makes sense by itself. Raises ConfigError."""
    nodes, rank = launch.nodes, launch.node_rank
    if nodes < 1:
        raise refuse("launch.nodes", nodes, "is below 1", "use 1 or more")
    if nodes == 1:
        if rank not in (None, 0):
            raise refuse("launch.node_rank", rank, "is one of several nodes, but launch.nodes=1", f"use launch.nodes={max(rank, 0) + 1}")
        return
    if rank is None or not 0 <= rank < nodes:
        rule = f"is needed with launch.nodes={nodes}" if rank is None else f"is none of launch.nodes={nodes}"
        raise refuse("launch.node_rank", rank, rule, f"use 0 on the first node, up to {nodes - 1} on the last")
    if launch.master is None:
        raise refuse("launch.master", None, f"is needed with launch.nodes={nodes}", "use HOST or HOST:PORT of node 0")
    split_master(launch.master)


def refuse_several_nodes(launch: LaunchConfig, verb: str) -> None:
    """For what runs on one machine alone. Raises ConfigError."""
    if launch.nodes > 1:
        raise refuse("launch.nodes", launch.nodes, f"is for training: tptrain {verb} starts ranks on one machine", "leave launch.nodes out")


def split_master(master: str) -> tuple[str, int]:
    """Host and port of `launch.master`. Raises ConfigError.

    >>> split_master("node-0"), split_master("10.0.0.1:4000"), split_master("[fd00::1]:4000"), split_master("fd00::1")
    (('node-0', 29500), ('10.0.0.1', 4000), ('fd00::1', 4000), ('fd00::1', 29500))
    """
    host, colon, port = master.rpartition(":")
    if not colon or (host.count(":") and not host.startswith("[")):  # no port: a bare name, or a bare IPv6 address
        host, port = master, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise refuse("launch.master", master, "is neither HOST nor HOST:PORT with a port from 1 to 65535", f"use HOST:{DEFAULT_PORT}")
    return host, int(port)
