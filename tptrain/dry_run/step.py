"""One training step of one rank, by the trainer itself, on tensors that have shapes but no values.

torch's fake process group stands for the other ranks, of any number: what is sent goes nowhere, what is received is there at once. Mesh,
model, engine, `fully_shard` and optimizer are the real ones. Not real are the initial values, which are not drawn; the rows of the
batch; and what the code reads of a tensor, which is 0.

Tensors lie on the CPU, so that no GPU is needed; `as_on_gpu` has the code do what it does on one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tptrain.config import Config
from tptrain.data.dataset import Data
from tptrain.dry_run.counter import CallCounter, group_names
from tptrain.dry_run.tracked import TrackedBytes
from tptrain.mesh import build_mesh
from tptrain.plan.communication import Totals
from tptrain.trainer import Trainer


@dataclass(frozen=True)
class Counted:
    """What one rank did in a step."""

    totals: Totals
    """Calls and bytes by group and operation."""
    peak_bytes: int
    """The most bytes of tensors alive at a time, parameters and optimizer state included."""
    seconds: float
    """That the dry run took."""


def count_step(config: Config, rank: int) -> Counted:
    """One step of a rank of the config's layout.

    The process must have no process group yet, and keeps the fake one: call this in a process of its own.
    """
    from torch.distributed._tools import fake_collectives as _  # noqa: F401  teaches fake tensors c10d's operators
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    began = time.perf_counter()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=config.processes, store=FakeStore())
    mesh = build_mesh(config.parallel, torch.device("cpu"), config.launch.timeout_seconds)
    tracked, counter = TrackedBytes(), CallCounter(group_names(mesh))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("tptrain.share.initialise"))
        if config.hardware.device == "cuda":
            stack.enter_context(as_on_gpu())
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), tracked, counter, NothingKnown()):
            stack.enter_context(mode)
        trainer = Trainer(config, mesh, Data(_Ones(config.data.seq_len), {}, {}, {}, 0, ""))
        tracked.add(trainer.share.modules.parameters())
        make_optimizer_state(trainer)
        tracked.restart()
        trainer.step()
        trainer.close()
    return Counted(counter.totals, tracked.peak_bytes, time.perf_counter() - began)


def make_optimizer_state(trainer: Trainer) -> None:
    """Have the optimizer's state there before the step, as it is in every step but the first."""
    for parameter in trainer.share.modules.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


class NothingKnown(TorchDispatchMode):
    """In its block, what is read of a fake tensor is 0. Tensors that have values, such as a mesh of ranks, keep them among themselves."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it would take as long as the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, unless it would bring a number to the program."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device  # more than half of all calls, so it is answered at once
        if not any(type(arg) is FakeTensor for arg in args):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
                with unset_fake_temporarily():
                    return func(*args, **(kwargs or {}))
        elif func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """In the block, where the code asks whether tensors lie on the CPU, it goes on as if they did not: gathers are one call of the library,
    logits' memory is not kept, gradients are not summed in pieces."""
    with contextlib.ExitStack() as stack:
        for name, value in _ON_GPU.items():
            stack.enter_context(mock.patch(name, value))
        yield


_ON_GPU: dict[str, Any] = {
    "tptrain.tensor_parallel.communication._by_exchange": lambda x, sizes: len(set(sizes)) > 1,
    "tptrain.tensor_parallel.scratch.Scratch.give_back": lambda scratch, tensor: None,
    "tptrain.optim.grad_norm._PIECE_ELEMENTS": 1 << 62,
}


class _Ones:
    """Rows of the token 1, without end."""

    samples_per_epoch = None

    def __init__(self, length: int) -> None:
        self._columns = length + 1

    def rows(self, first: int, count: int) -> np.ndarray:
        return np.ones((count, self._columns), dtype=np.int64)
