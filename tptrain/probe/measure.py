"""What a rank does to measure this machine, while the others do the same: products, passes over memory, small operations, links."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tptrain.config import Config
from tptrain.doctor.machine import host_memory
from tptrain.doctor.together import Together
from tptrain.mesh import Mesh, build_mesh, own_device
from tptrain.probe.record import Measured, fit_rate
from tptrain.tensor_parallel.communication import start_all_reduce

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WINDOW_SECONDS = 0.06
_WINDOWS = 5
_PRODUCT = {"cpu": (512, 1024, (32, 128, 512)), "cuda": (4096, 4096, (128, 512, 4096))}
"""Matrices [m, k] x [k, n] by device: m, n, and the k."""
_ACTIVATION = {"cpu": (512, 512), "cuda": (4096, 4096)}
"""Tokens and hidden size."""
_LAYERS = 10


def measure(config: Config) -> dict[str, Any] | None:
    """The `Measured` as a dict on rank 0, None on the others. Every rank calls this. config: of a layout of tp alone, all its ranks on this
    machine; passes over memory are in its train.precision."""
    mesh = build_mesh(config.parallel, own_device(config.hardware.device), config.launch.timeout_seconds)
    together = Together(mesh.world)
    kind = mesh.device.type
    rates: dict[str, float] = {}
    halves: dict[str, float] = {}
    for name, dtype in _DTYPES.items():
        _tell(mesh, f"matrix products in {name}")
        rates[name], halves[name] = _products(dtype, mesh.device, together)
    _tell(mesh, "memory")
    bandwidth = _passes(_DTYPES[config.train.precision], mesh.device, together)
    kernel = _small_operations(mesh.device, together)
    links = {}
    if mesh.world.size() > 1:
        _tell(mesh, "links")
        links = _links(mesh, together)
    found = Measured(
        device=kind,
        ranks=mesh.world.size(),
        matmul_flops_per_second=rates,
        matmul_half_size=halves,
        memory_bytes_per_second=bandwidth,
        kernel_seconds=kernel,
        memory_bytes=_memory(mesh),
        **links,
    )
    return found.to_dict() if mesh.tp_rank == 0 else None


def _products(dtype: torch.dtype, device: torch.device, together: Together) -> tuple[float, float]:
    """See `fit_rate`."""
    m, n, depths = _PRODUCT[device.type]
    seconds = []
    for k in depths:
        left, right = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        result = torch.empty(m, n, dtype=dtype, device=device)
        each = _seconds_each(partial(torch.mm, left, right, out=result), device, together)
        seconds.append(each / (2 * m * n * k))
    return fit_rate([float(min(m, n, k)) for k in depths], seconds)


def _passes(dtype: torch.dtype, device: torch.device, together: Together) -> float:
    """Bytes a second in a residual sum, a norm and an activation, forward and backward."""
    tokens, hidden = _ACTIVATION[device.type]
    x, y = (torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_() for _ in range(2))
    wide = torch.randn(tokens, 4 * hidden, device=device).to(dtype).requires_grad_()
    gradient, wide_gradient = torch.ones_like(x), torch.ones_like(wide)

    def work() -> None:
        F.layer_norm(x + y, x.shape[-1:]).backward(gradient)
        F.gelu(wide, approximate="tanh").backward(wide_gradient)
        x.grad = y.grad = wide.grad = None

    elements = (3 + 2 + 3) * x.numel() + (2 + 3) * wide.numel()
    return elements * x.element_size() / _seconds_each(work, device, together)


def _small_operations(device: torch.device, together: Together) -> float:
    """Seconds of an operation that has next to nothing to compute, in a forward and backward."""
    weights = [torch.eye(4, device=device, requires_grad=True) for _ in range(_LAYERS)]
    x = torch.ones(4, 4, device=device)

    def work() -> None:
        y = x
        for weight in weights:
            y = F.gelu(y @ weight)
        y.sum().backward()

    return _seconds_each(work, device, together) / (5 * _LAYERS)  # two operations forward, three backward


def _links(mesh: Mesh, together: Together) -> dict[str, float]:
    """Bandwidth and latency of the ring that all ranks' all-reduce goes round.

    What counts is what it adds to a product before it, if that is more than it takes alone: in training as well ranks come to it from
    their products, never quite at once, with their caches full of something else.
    """
    tokens, hidden = _ACTIVATION[mesh.device.type]
    left, right = torch.randn(tokens // 2, hidden, device=mesh.device), torch.randn(hidden, 4 * hidden, device=mesh.device)
    result = torch.empty(tokens // 2, 4 * hidden, device=mesh.device)
    messages = [torch.zeros(numbers, device=mesh.device) for numbers in (mesh.world.size(), tokens * hidden)]
    multiply = partial(torch.mm, left, right, out=result)

    def add_up(message: torch.Tensor, after: Callable[[], object]) -> None:
        after()
        start_all_reduce(message, mesh.tp_group).wait()

    ways: list[Callable[[], object]] = [multiply]
    ways += [partial(add_up, message, after) for after in (_nothing, multiply) for message in messages]
    calls = [_calls(way, mesh.device, together) for way in ways]
    rounds = [[_window(way, count, mesh.device, together) for way, count in zip(ways, calls, strict=True)] for _ in range(_WINDOWS)]
    alone = [min(turn[place] for turn in rounds) for place in (1, 2)]
    added = [statistics.median(turn[place] - turn[0] for turn in rounds) for place in (3, 4)]
    small, large = map(max, alone, added)
    n, size = mesh.world.size(), messages[1].numel() * messages[1].element_size()
    return {
        "node_bytes_per_second": 2 * (n - 1) / n * size / max(large - small, large / 10),
        "node_latency_seconds": small / (2 * (n - 1)),
    }


def _nothing() -> None:
    pass


def _seconds_each(work: Callable[[], object], device: torch.device, together: Together) -> float:
    """Seconds of one of many calls, one after another, until all ranks are done; of several windows the shortest, as others may use the
    machine as well."""
    calls = _calls(work, device, together)
    return min(_window(work, calls, device, together) for _ in range(_WINDOWS))


def _calls(work: Callable[[], object], device: torch.device, together: Together) -> int:
    """How many fill a window, the same on all ranks."""
    _window(work, 1, device, together)
    return min(max(1, int(_WINDOW_SECONDS / max(_window(work, 1, device, together), 1e-7))), 10_000)


def _window(work: Callable[[], object], calls: int, device: torch.device, together: Together) -> float:
    """Seconds of a call, from when the first rank begins until the last has ended: ranks that share a core take turns on it, and one that
    gets it late would by itself seem as fast as if it had it alone. All are on this machine and read one clock."""
    together.wait()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ended = time.perf_counter()
    return (together.largest(ended) - together.smallest(began)) / calls


def _memory(mesh: Mesh) -> float:
    """Bytes of the device, or of the machine for each rank."""
    if mesh.device.type == "cuda":
        return float(torch.cuda.mem_get_info(mesh.device)[1])
    return host_memory()[1] / mesh.world.size()


def _tell(mesh: Mesh, what: str) -> None:
    """On the terminal, once; its standard output is the plan's."""
    if mesh.tp_rank == 0:
        print(f"measuring this machine: {what}", file=sys.stderr, flush=True)
