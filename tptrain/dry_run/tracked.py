"""The bytes of tensors that are alive, counted while a program runs: on a CPU, on fake tensors, on the meta device.

What an allocator does beneath (rounding, fragments, what it keeps) is not seen, nor what a kernel allocates and frees inside itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TrackedBytes(TorchDispatchMode):
    """A context in which every storage that an operation returns counts from then on until it is freed.

    Storages are held by weak reference, so tracking keeps nothing alive; two views of one storage count once. `fully_shard` frees and
    takes a storage's memory without an operation; so what seems to be a new peak is summed anew before it counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        """The most that was alive at any time since the beginning, or since `restart`."""
        self.on_peak: Callable[[Any], None] | None = None
        """Called with the operation at which a new peak was reached."""
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by the storage's address, unique while it is alive
        self._sizes: dict[int, int] = {}
        self._current = 0

    @property
    def current_bytes(self) -> int:
        """What is alive now."""
        self._sum_anew()
        return self._current

    def restart(self) -> None:
        """Forget the peak so far; what is alive still counts."""
        self.peak_bytes = self.current_bytes

    def add(self, tensors: Iterable[Any]) -> None:
        """Count tensors that were made outside of the context. What is no tensor is passed over."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        if self._current > self.peak_bytes:
            self._sum_anew()
            if self._current > self.peak_bytes:
                self.peak_bytes = self._current
                if self.on_peak is not None:
                    self.on_peak(func)
        return result

    def _add(self, tensor: Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._sizes[key] = storage.nbytes()
            self._current += self._sizes[key]

    def _forget(self, key: int) -> None:
        self._alive.pop(key, None)
        self._current -= self._sizes.pop(key, 0)

    def _sum_anew(self) -> None:
        for key, reference in list(self._alive.items()):
            storage = reference()
            if storage is not None:
                self._current += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()
