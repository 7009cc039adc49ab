"""Communication on plain tensors, not differentiable: what the autograd pairs and the layers are made of.

Each `start_*` returns at once with a `Pending`; computation between it and `wait()` runs while the messages travel. All
results are tensors of their own, contiguous, and the inputs may have any strides.

Two ways to gather and to reduce-scatter:
    exchange   each rank sends each other rank the part meant for it. On the CPU (gloo) it takes half the time of gloo's own
               collectives for the small groups of tensor parallelism, and parts may be of different sizes.
    library    one call of NCCL, which wants equal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two; 2.11 has the old names alone.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CommunicationError(RuntimeError):
    """A rank of the group did not answer in time, or is gone."""

    waited_for: int | None = None
    """Which one, counted over the whole job, where there was but one."""


class Pending:
    """A result under way."""

    def __init__(self, what: str, works: Sequence[dist.Work | None], group: dist.ProcessGroup, finish: Callable[[], Tensor]) -> None:
        self._what, self._works, self._group, self._finish = what, works, group, finish

    def wait(self) -> Tensor:
        """The result, once it is here. Raises CommunicationError, which names the operation and the ranks."""
        try:
            for work in self._works:
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            others = [rank for rank in dist.get_process_group_ranks(self._group) if rank != dist.get_rank()]
            message = f"rank {dist.get_rank()} gave up its {self._what} with rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
            given_up = CommunicationError(f"{message}: {error}")
            given_up.waited_for = others[0] if len(others) == 1 else None
            raise given_up from error
        return self._finish()


def shard_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """First and one-past-last element of part `index` of `parts`.

    >>> [shard_bounds(257, 4, i) for i in range(4)]
    [(0, 65), (65, 130), (130, 195), (195, 257)]
    """
    step = -(-size // parts)
    return min(index * step, size), min((index + 1) * step, size)


def shard_sizes(size: int, parts: int) -> list[int]:
    """Sizes of all parts; the last ones may be smaller, or zero.

    >>> shard_sizes(5, 4)
    [2, 2, 1, 0]
    """
    return [stop - start for start, stop in (shard_bounds(size, parts, index) for index in range(parts))]


def split(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of `x` along `dim`, a view."""
    start, stop = shard_bounds(x.shape[dim], group.size(), group.rank())
    return x.narrow(dim, start, stop - start)


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """`x` reduced over the group, in a tensor of its own."""
    return start_all_reduce(x.clone(memory_format=torch.contiguous_format), group, op).wait()


def start_all_reduce(x: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """The ranks' `x` reduced. A contiguous `x` is reduced in place: the caller gives it away."""
    total = x.contiguous()
    return Pending("all-reduce", [dist.all_reduce(total, op, group=group, async_op=True)], group, lambda: total)


def start_all_gather(x: Tensor, dim: int, size: int, group: dist.ProcessGroup) -> Pending:
    """The ranks' parts `x` side by side along `dim`, where the whole has `size` elements, split as `shard_bounds` says."""
    dim, sizes, x = dim % x.ndim, shard_sizes(size, group.size()), x.contiguous()
    if _by_exchange(x, sizes):
        whole = x.new_empty(*x.shape[:dim], size, *x.shape[dim + 1 :])
        places = whole.split(sizes, dim)
        arriving = [place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format) for place in places]
        places[group.rank()].copy_(x)
        works = _exchange([x] * group.size(), arriving, group)

        def finish() -> Tensor:
            for rank, (place, arrived) in enumerate(zip(places, arriving, strict=True)):
                if place is not arrived and rank != group.rank():
                    place.copy_(arrived)
            return whole

        return Pending("all-gather", works, group, finish)
    end_to_end = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    work = all_gather_single(end_to_end, x, group=group, async_op=True)
    parts = end_to_end.unflatten(0, (group.size(), -1))
    return Pending("all-gather", [work], group, lambda: parts.movedim(0, dim).flatten(dim, dim + 1).contiguous())


def start_reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Pending:
    """This rank's part along `dim` of the sum of the ranks' `x`."""
    dim, sizes = dim % x.ndim, shard_sizes(x.shape[dim], group.size())
    if _by_exchange(x, sizes):
        leaving = [part.contiguous() for part in x.split(sizes, dim)]
        mine = leaving[group.rank()]
        arriving = [mine if rank == group.rank() else torch.empty_like(mine) for rank in range(group.size())]
        works = _exchange(leaving, arriving, group)

        def finish() -> Tensor:
            total = arriving[0].clone()
            for part in arriving[1:]:  # in the order of the ranks, whoever adds: the same bits under any split
                total += part
            return total

        return Pending("reduce-scatter", works, group, finish)
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    total = torch.empty_like(parts[0])
    return Pending("reduce-scatter", [reduce_scatter_single(total, parts.flatten(0, 1), group=group, async_op=True)], group, lambda: total)


def all_reduce_flat(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each of many small tensors over the group, in place: one message a dtype rather than one a tensor."""
    in_one_buffer(tensors, lambda flat: start_all_reduce(flat, group).wait())


def in_one_buffer(tensors: Sequence[Tensor], communicate: Callable[[Tensor], object]) -> None:
    """Have `communicate` change, in place, one flat buffer a dtype that holds all of the tensors, and write it back to them."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        mine = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in mine])
        communicate(flat)
        for tensor, part in zip(mine, flat.split([tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _by_exchange(x: Tensor, sizes: Sequence[int]) -> bool:
    return x.device.type == "cpu" or len(set(sizes)) > 1


def _exchange(leaving: Sequence[Tensor], arriving: Sequence[Tensor], group: dist.ProcessGroup) -> list[dist.Work | None]:
    """Start sending leaving[i] to rank i of the group and receiving arriving[i] from it, for all i but this rank."""
    peers = [peer for peer in range(group.size()) if peer != group.rank()]
    if leaving[0].device.type == "cpu":  # gloo gains nothing from a batch, whose checks take as long as a small message
        works = [dist.isend(leaving[peer], group=group, group_dst=peer) for peer in peers if leaving[peer].numel()]
        return works + [dist.irecv(arriving[peer], group=group, group_src=peer) for peer in peers if arriving[peer].numel()]
    operations = [dist.P2POp(dist.isend, leaving[peer], group=group, group_peer=peer) for peer in peers if leaving[peer].numel()]
    operations += [dist.P2POp(dist.irecv, arriving[peer], group=group, group_peer=peer) for peer in peers if arriving[peer].numel()]
    return list(dist.batch_isend_irecv(operations)) if operations else []
