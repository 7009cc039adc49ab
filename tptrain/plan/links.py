"""Which link each process group runs on, and how long a collective takes there.

Ranks are numbered with tp innermost, then dp, then pp (`mesh.py`), and machines hold runs of ranks. So tp sits closest together.

    all_reduce                  ring   2 (n-1) latency + 2 (n-1)/n bytes/bandwidth         or, if that is less,
                                tree   2 log2(n) latency + 2 bytes/bandwidth
    all_gather, reduce_scatter  ring   (n-1) latency + (n-1)/n bytes/bandwidth
    broadcast                   tree   log2(n) (latency + bytes/bandwidth)                 or
                                scatter and ring   (log2(n) + n-1) latency + 2 (n-1)/n bytes/bandwidth
    send, receive                      latency + bytes/bandwidth

The ring's and the broadcast's terms are those of Thakur, Rabenseifner and Gropp 2005 (Optimization of collective communication
operations in MPICH), log2(n) rounded up, without their time of adding up, which a GPU has in plenty. NCCL runs the same rings, and its
double binary tree (Sanders, Speck and Träff 2009) has the tree's terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tptrain.config import Config, refuse
from tptrain.plan.communication import Traffic


@dataclass(frozen=True)
class Link:
    """What joins the ranks of a group, for one rank and one way."""

    bytes_per_second: float
    latency_seconds: float


def group_links(config: Config) -> dict[str, Link]:
    """The link of each group with more than one rank: tp, dp, pp_up, pp_down, embedding, world.

    A group that leaves its machine is as fast as the network, times its members on one machine, as each of them has its share of the
    network; but no faster than inside the machine. Neighbours of a pipeline are on two machines unless all ranks are on one.
    Raises ConfigError where the hardware's link is unknown.
    """
    parallel, dp = config.parallel, int(config.parallel.dp)
    spans = {"tp": (parallel.tp, 1), "dp": (dp, parallel.tp), "pp_up": (parallel.pp, parallel.tp * dp)}
    spans |= {"pp_down": spans["pp_up"], "embedding": (min(2, parallel.pp), parallel.tp * dp * max(1, parallel.pp - 1))}
    spans["world"] = (config.processes, 1)
    return {name: _link(config, ranks, stride, name) for name, (ranks, stride) in spans.items() if ranks > 1}


def group_size(config: Config, group: str) -> int:
    """Ranks that take part in a call over a group that `Traffic` names: of a pipeline the two that send and receive."""
    parallel = config.parallel
    sizes = {"tp": parallel.tp, "dp": int(parallel.dp), "world": config.processes}
    return sizes.get(group, min(2, parallel.pp))


def traffic_seconds(config: Config, traffic: Traffic, links: Mapping[str, Link]) -> float:
    """What calls take one after another with nothing else going on. links: as `group_links` gives them."""
    size, each = group_size(config, traffic.group), traffic.bytes // traffic.calls
    return traffic.calls * collective_seconds(traffic.operation, size, each, links[traffic.group])


def _link(config: Config, ranks: int, stride: int, group: str) -> Link:
    """The link of a group whose ranks lie `stride` apart."""
    hardware = config.hardware
    machine = hardware.devices_per_node or config.processes
    if config.processes <= machine or machine % (ranks * stride) == 0:
        return _inside(config, group)
    bandwidth = _known(config, "network_bytes_per_second", group)
    members = max(1, min(ranks, machine // stride))
    if members > 1 and not group.startswith("pp"):
        bandwidth = min(members * bandwidth, _inside(config, group).bytes_per_second)
    return Link(bandwidth, _known(config, "network_latency_seconds", group))


def _inside(config: Config, group: str) -> Link:
    return Link(_known(config, "node_bytes_per_second", group), _known(config, "node_latency_seconds", group))


def _known(config: Config, key: str, group: str) -> float:
    value = getattr(config.hardware, key)
    if value is None:
        rule = f"is unknown, and the ranks of {group.replace('_', ' ')} talk over it"
        raise refuse(f"hardware.{key}", None, rule, "use hardware=h100 or another that says it, or set it")
    return float(value)


def collective_seconds(operation: str, ranks: int, bytes: int, link: Link) -> float:
    """One call, of so many bytes of the larger of its input and output on a rank.

    The time of GPT-3 175B's all-reduces in one forward and backward of 2048 tokens in fp16 under tp=8, four a layer, over 300 GB/s one way:

    >>> round(4 * 96 * collective_seconds("all_reduce", 8, 2 * 2048 * 12288, Link(300e9, 0)), 4)
    0.1127
    """
    if ranks == 1:
        return 0.0
    sending, latency = bytes / link.bytes_per_second, link.latency_seconds
    rounds, ring = (ranks - 1).bit_length(), (ranks - 1) * latency + (ranks - 1) / ranks * sending
    if operation == "all_reduce":
        return min(2 * ring, 2 * rounds * latency + 2 * sending)
    if operation in ("all_gather", "reduce_scatter"):
        return ring
    if operation == "broadcast":
        return min(rounds * (latency + sending), rounds * latency + ring + (ranks - 1) / ranks * sending)
    if operation in ("send", "receive"):
        return latency + sending
    raise ValueError(f"{operation} is no operation of this model")
