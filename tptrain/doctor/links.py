"""Latency and bandwidth of every group of the layout, in the way in which training uses it.

    tp    all-reduce; with sequence parallelism all-gather and reduce-scatter
    pp    a message to the next rank of the pipeline and one back: first the pairs that begin with an even rank, then the others
    dp    all-gather and reduce-scatter, as `fully_shard` does
    all   all-reduce, as the gradient's norm does

All groups of one kind are measured at the same time, as they work in training, and all ranks wait for each other before each message.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.config import ParallelConfig
from tptrain.doctor.record import Link
from tptrain.doctor.together import Together
from tptrain.mesh import Mesh
from tptrain.tensor_parallel.communication import (
    all_gather_single,
    reduce_scatter_single,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)

LARGE_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""The message by which bandwidth is measured; that for latency has one number a rank."""
_KINDS = ("tp", "pp", "dp", "all")
_NUMBER_BYTES = 4
_SECONDS = 0.1
"""How long one kind of message is repeated, about."""
_LEAST, _MOST = 5, 30
"""Repetitions."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Exchange:
    """One kind of communication, and this rank's part in it."""

    kind: str
    operation: str
    ranks: Sequence[int]
    """Those that it goes on between; none where this rank takes no part."""
    make: Callable[[int], Call] | None = None
    """From the message's numbers, over all ranks together where it is gathered, to what sends it."""
    share: float = 1.0
    """Of the message's bytes, what a rank sends."""
    trips: int = 1
    """Messages one after the other in a call."""


def measure_links(mesh: Mesh, parallel: ParallelConfig, hosts: Sequence[str], together: Together) -> list[Link]:
    """The links that this rank is part of, as this rank measured them. Every rank calls this. hosts: of each rank."""
    links = []
    for exchange in exchanges(mesh, parallel):
        count = max(len(exchange.ranks), 1)
        large = LARGE_BYTES[mesh.device.type] // _NUMBER_BYTES // count * count
        latency, seconds = (_median_seconds(exchange, numbers, mesh.device, together) for numbers in (count, large))
        if exchange.make is not None:
            bandwidth = large * _NUMBER_BYTES * exchange.share / seconds
            across = len({hosts[rank] for rank in exchange.ranks}) > 1
            links.append(Link(exchange.kind, exchange.operation, list(exchange.ranks), across, latency, bandwidth))
    return links


def slowest_view(links: Sequence[Link]) -> list[Link]:
    """One link of each that several ranks measured, as the rank saw it that waited longest; in the order of the table above."""
    found: dict[tuple[str, str, tuple[int, ...]], Link] = {}
    for link in links:
        first = found.setdefault((link.kind, link.operation, tuple(link.ranks)), link)
        first.latency_seconds = max(first.latency_seconds, link.latency_seconds)
        first.bandwidth_bytes_per_second = min(first.bandwidth_bytes_per_second, link.bandwidth_bytes_per_second)
    return sorted(found.values(), key=lambda link: (_KINDS.index(link.kind), link.operation, link.ranks))


def exchanges(mesh: Mesh, parallel: ParallelConfig) -> Iterator[Exchange]:
    """What training communicates under the layout: the same kinds in the same order on every rank."""
    device, n = mesh.device, mesh.tp_size
    if n > 1 and parallel.sequence_parallel:
        group, ranks = mesh.tp_group, mesh.ranks[mesh.pp_rank][mesh.dp_rank]
        yield Exchange("tp", "all-gather", ranks, lambda count: _gather(count, device, group), (n - 1) / n)
        yield Exchange("tp", "reduce-scatter", ranks, lambda count: _reduce_scatter(count, device, group), (n - 1) / n)
    elif n > 1:
        yield _all_reduce("tp", mesh.ranks[mesh.pp_rank][mesh.dp_rank], mesh.tp_group, device)
    yield from _neighbours(mesh, parallel)
    n = mesh.dp_size
    if n > 1:
        dp_group = mesh.dp_group
        ranks = [copy[mesh.tp_rank] for copy in mesh.ranks[mesh.pp_rank]]
        yield Exchange("dp", "all-gather", ranks, lambda count: _gather_single(count, device, dp_group), (n - 1) / n)
        yield Exchange("dp", "reduce-scatter", ranks, lambda count: _reduce_scatter_single(count, device, dp_group), (n - 1) / n)
    if mesh.world.size() > 1:
        yield _all_reduce("all", range(mesh.world.size()), mesh.world, device)


def _neighbours(mesh: Mesh, parallel: ParallelConfig) -> Iterator[Exchange]:
    """Pairs of this rank's pipeline; with several stages a rank also the last and the first, where one stage follows the other."""
    places = range(mesh.pp_size - 1)
    turns = [[(place, place + 1) for place in places[parity::2]] for parity in (0, 1)]
    if mesh.pp_size > 2 and int(parallel.stages_per_rank) > 1 and parallel.schedule != "zb_v":
        turns.append([(0, mesh.pp_size - 1)])
    for turn in filter(None, turns):
        pair = next((pair for pair in turn if mesh.pp_rank in pair), None)
        if pair is None:
            yield Exchange("pp", "send", ())
        else:
            low, high = (mesh.pp_ranks[place] for place in pair)
            yield Exchange("pp", "send", (low, high), _there_and_back(mesh, low, high), trips=2)


def _median_seconds(exchange: Exchange, numbers: int, device: torch.device, together: Together) -> float:
    """Of one message. The repetitions are the same number on all ranks."""
    call = exchange.make(numbers) if exchange.make is not None else None

    def once() -> float:
        together.wait()
        began = time.perf_counter()
        if call is not None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()  # which may have to connect
    repetitions = int(min(_MOST, max(_LEAST, _SECONDS / together.largest(once()))))
    return statistics.median(once() for _ in range(repetitions)) / exchange.trips


# ---- messages --------------------------------------------------------------------------------------------


def _all_reduce(kind: str, ranks: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> Exchange:
    n = len(ranks)

    def make(count: int) -> Call:
        message = torch.zeros(count, device=device)
        return lambda: start_all_reduce(message, group).wait()

    return Exchange(kind, "all-reduce", ranks, make, 2 * (n - 1) / n)


def _gather(count: int, device: torch.device, group: dist.ProcessGroup) -> Call:
    part = torch.zeros(count // group.size(), device=device)
    return lambda: start_all_gather(part, 0, count, group).wait()


def _reduce_scatter(count: int, device: torch.device, group: dist.ProcessGroup) -> Call:
    whole = torch.zeros(count, device=device)
    return lambda: start_reduce_scatter(whole, 0, group).wait()


def _gather_single(count: int, device: torch.device, group: dist.ProcessGroup) -> Call:
    part, whole = _part_and_whole(count, device, group)
    return lambda: all_gather_single(whole, part, group=group)


def _reduce_scatter_single(count: int, device: torch.device, group: dist.ProcessGroup) -> Call:
    part, whole = _part_and_whole(count, device, group)
    return lambda: reduce_scatter_single(part, whole, group=group)


def _part_and_whole(count: int, device: torch.device, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    return torch.zeros(count // group.size(), device=device), torch.zeros(count, device=device)


def _there_and_back(mesh: Mesh, low: int, high: int) -> Callable[[int], Call]:
    """A message from rank `low` to rank `high` and one back, in the groups in which the pipeline sends them."""

    def make(count: int) -> Call:
        message = torch.zeros(count, device=mesh.device)

        def call() -> None:
            if dist.get_rank() == low:
                dist.send(message, high, group=mesh.pp_up)
                dist.recv(message, high, group=mesh.pp_down)
            else:
                dist.recv(message, low, group=mesh.pp_up)
                dist.send(message, low, group=mesh.pp_down)

        return call

    return make
