"""How fast each rank multiplies matrices while all of them do, as in training: a busy core, a hot or a throttled device shows.

What counts is the rate over whole windows of time, waiting for a core included, and of several windows the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tptrain.doctor.together import Together

WINDOW_SECONDS = 0.1
WINDOWS = 5
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LEAST_SECONDS = 0.004
"""How long one product should take the fastest rank."""


def matmul_rate(dtype: torch.dtype, device: torch.device, together: Together) -> tuple[float, float | None]:
    """FLOPs a second of this rank in products of square matrices, and on the CPU the share of the time in which its threads ran.

    Every rank calls this; all multiply matrices of the same size at the same time.
    """
    size, multiply = _fitting_product(dtype, device, together)
    rates, ran, took = [], 0.0, 0.0
    for _ in range(WINDOWS):
        together.wait()
        count, began, began_cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - began) < WINDOW_SECONDS:
            multiply()
            count += 1
        rates.append(2 * size**3 * count / elapsed)
        ran, took = ran + time.process_time() - began_cpu, took + elapsed
    share = ran / (took * torch.get_num_threads()) if device.type == "cpu" else None
    return statistics.median(rates), share


def _fitting_product(dtype: torch.dtype, device: torch.device, together: Together) -> tuple[int, Callable[[], None]]:
    """The size of the smallest matrices whose product takes the fastest rank long enough to be timed, and their product."""
    for size in _SIZES:
        multiply = _product(size, dtype, device)
        if together.smallest(min(_seconds(multiply) for _ in range(3))) >= _LEAST_SECONDS:
            break
    return size, multiply


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Multiplies two matrices [size, size], and returns when it is done."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return multiply


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
