"""What the tests of split layers share: tests that run on ranks, random tensors, a rank's part of a whole tensor by `torch.chunk`,
and watchers of what a block of code communicates, computes and allocates."""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tests.support import small_config
from tptrain.mesh import Mesh, build_mesh
from tptrain.tensor_parallel import linear
from tptrain.tensor_parallel.communication import Pending, all_reduce_flat
from tptrain.tensor_parallel.parameter import partial_gradients

CPU = torch.device("cpu")

# ---- tests on ranks ----------------------------------------------------------------------------------------

LAYOUTS = {"tp1": {"tp": 1}, "tp2": {"tp": 2}, "tp3": {"tp": 3}, "tp4": {"tp": 4}, "tp2_dp2": {"tp": 2, "dp": 2}}
SPLIT = ("tp2", "tp3", "tp4", "tp2_dp2")
"""The layouts with something to communicate."""

Check = tuple[str, str]
"""A check's module and name."""


def on_ranks(*layouts: str) -> Callable[[Callable[[Mesh], None]], Any]:
    """Make a test of a function of the mesh, which every rank calls; one test for each of the layouts (none named: all).

    All tests of a layout share one start of ranks (`conftest.Outcomes`), which costs more than most of them.
    """

    def decorate(check: Callable[[Mesh], None]) -> Any:
        @pytest.mark.parametrize("layout", layouts or tuple(LAYOUTS))
        def test(layout: str, outcomes: Any) -> None:
            error = outcomes.error(layout, (check.__module__, check.__name__))
            if error:
                pytest.fail(error, pytrace=False)

        test.__name__, test.__qualname__, test.__module__, test.__doc__ = (
            check.__name__, check.__qualname__, check.__module__, check.__doc__,
        )  # fmt: skip
        test.check = check  # type: ignore[attr-defined]
        return test

    return decorate


def run_checks(layout: str, checks: Sequence[Check]) -> dict[Check, str | None]:
    """The tracebacks of the checks that failed, None for the others. After a failure the ranks start anew with the next check."""
    outcomes: dict[Check, str | None] = {}
    left = list(checks)
    while left:
        reports = run_ranks(math.prod(LAYOUTS[layout].values()), _run_on_rank, layout, left)
        passed = min(count for count, _ in reports)  # a rank whose neighbour failed may fail in a later check
        outcomes |= dict.fromkeys(left[:passed])
        if passed < len(left):
            errors = [f"rank {rank}: {error}" for rank, (count, error) in enumerate(reports) if count == passed and error]
            outcomes[left[passed]] = "\n".join(sorted(errors, key=lambda error: "Connection closed by peer" in error))  # causes first
        left = left[passed + 1 :]
    return outcomes


def _run_on_rank(rank: int, layout: str, checks: Sequence[Check]) -> tuple[int, str | None]:
    mesh = mesh_of(**LAYOUTS[layout])
    for count, (module, name) in enumerate(checks):
        try:
            getattr(importlib.import_module(module), name).check(mesh)
        except BaseException:  # pytest.raises fails with one that is no Exception
            return count, traceback.format_exc()
    return len(checks), None


def mesh_of(timeout_seconds: float = 60, **layout: int) -> Mesh:
    """The mesh of a layout such as tp=2, dp=2 (the axes not named are 1)."""
    return build_mesh(replace(small_config().parallel, **layout), torch.device("cpu"), timeout_seconds)


# ---- tensors -----------------------------------------------------------------------------------------------


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal values, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(whole: Tensor, dim: int | None, parts: int, index: int) -> Tensor:
    """Part `index` of a tensor split along `dim` as `torch.chunk` splits (None: all of it). Parts may be empty."""
    if dim is None:
        return whole
    chunks = whole.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else whole.narrow(dim, 0, 0)


def strides_of(rank: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to lay the values of a tensor of two or more dimensions out in memory; the last one changes the values too."""

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    return {
        "contiguous": lambda t: t.clone(),
        "transposed": transposed,
        "transposed on one rank alone": lambda t: transposed(t) if rank == 0 else t.clone(),
        "every second": lambda t: torch.stack((t, t), dim=-1).flatten(-2)[..., ::2],
        "expanded": lambda t: t[:1].expand_as(t),
    }


# ---- layers ------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Write this rank's part of `whole` into a parameter that is split over a one-dimensional mesh."""
    assert isinstance(parameter, DTensor)
    assert parameter.shape == whole.shape
    (placement,) = parameter.placements
    dim = placement.dim if isinstance(placement, Shard) else None
    parameter.to_local().copy_(part(whole, dim, parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()))


def load(layer: nn.Module, twin: nn.Module) -> None:
    """Give a split layer the weights of its serial twin."""
    for name, parameter in layer.named_parameters():
        fill(parameter, twin.get_parameter(name).data)


def serial_linear(inputs: int, outputs: int, bias: bool, seed: int = 1) -> nn.Linear:
    """A twin with random weights, the same on every rank."""
    twin = nn.Linear(inputs, outputs, bias=bias)
    twin.weight.data = random(outputs, inputs, seed=seed)
    if bias:
        twin.bias.data = random(outputs, seed=seed + 1)
    return twin


def whole_gradient(parameter: Tensor) -> Tensor:
    """A labelled parameter's gradient as a plain tensor; its label must be the parameter's own."""
    gradient = parameter.grad
    assert isinstance(gradient, DTensor)
    assert isinstance(parameter, DTensor)
    assert gradient.placements == parameter.placements
    assert gradient.shape == parameter.shape
    return gradient.full_tensor()


def check_gradients(layer: nn.Module, twin: nn.Module, group: dist.ProcessGroup) -> None:
    """All gradients are the twin's, once those that each rank has a part of are summed over the group, as a step does."""
    all_reduce_flat(partial_gradients(layer), group)
    ours, theirs = dict(layer.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert_close(
            whole_gradient(parameter), theirs[name].grad, rtol=1e-5, atol=2e-5,
            msg=lambda text, n=name: f"{type(layer).__name__}.{n}: {text}",
        )  # fmt: skip
        replicated = parameter.grad.to_local()
        if replicated.shape == parameter.shape:  # full_tensor() asks no other rank
            assert_close(replicated, theirs[name].grad, rtol=1e-5, atol=2e-5)


# ---- watchers ----------------------------------------------------------------------------------------------


class operations(TorchDispatchMode):
    """`with operations() as counts`: every operation on plain tensors by name, in forward and backward."""

    def __enter__(self) -> dict[str, int]:
        self.counts: dict[str, int] = {}
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor breaks it up first, and what it does to plain tensors arrives here
        name = self.name_of(function)
        if name:
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))

    def name_of(self, function: Any) -> str | None:
        """What an operation is counted as; None: not at all."""
        return function.__name__.split(".")[0]


class collectives(operations):
    """`with collectives() as counts`: every collective of the block by name, those of `torch.distributed` and DTensor's own."""

    def name_of(self, function: Any) -> str | None:
        """Of c10d's operations those that send."""
        sends = function.namespace in ("c10d", "_c10d_functional") and not any(
            word in function.__name__ for word in ("wait", "_wrap_tensor")
        )
        return function.__name__.split(".")[0].rstrip("_") if sends else None


class results(TorchDispatchMode):
    """`with results() as made`: the plain tensors that the operations of the block made, with the operation's name, in order."""

    def __init__(self, made: list[tuple[str, Any]] | None = None) -> None:
        super().__init__()
        self.made: list[tuple[str, Any]] = [] if made is None else made

    def __enter__(self) -> list[tuple[str, Any]]:
        super().__enter__()
        return self.made

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        self.made += [(name, tensor) for tensor in (result if isinstance(result, list | tuple) else [result]) if isinstance(tensor, Tensor)]
        return result


@contextmanager
def order_of_linear() -> Iterator[list[str]]:
    """The order of a block's events in `linear.py`: "start all_gather", "wait all_gather" and so on, and the shape of each product."""
    events: list[str] = []

    def watched(name: str) -> Callable[..., Pending]:
        original = getattr(linear, f"start_{name}")

        def start(*args: Any) -> Pending:
            events.append(f"start {name}")
            pending = original(*args)
            finish = pending.wait

            def wait() -> Tensor:
                events.append(f"wait {name}")
                return finish()

            pending.wait = wait
            return pending

        return start

    class products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if DTensor in types:
                return NotImplemented
            result = function(*args, **(kwargs or {}))
            if function.__name__.split(".")[0] in ("mm", "addmm", "addmm_"):
                events.append(f"product {list(result.shape)}")
            return result

    with ExitStack() as stack:
        for name in ("all_gather", "all_reduce", "reduce_scatter"):
            stack.enter_context(mock.patch.object(linear, f"start_{name}", watched(name)))
        stack.enter_context(products())
        yield events
