"""What the ranks of `tptrain check` do: a few training steps, looked at as whole tensors.

    one process first   start ── gradients ── update ── gradients ── update ── ...     every tensor goes into a file
    then a layout       the same steps; every tensor is gathered, one at a time, and compared with its file

After each step the layout takes over the one process's weights, so that every step starts from the same bits. Else rounding
would grow from step to step, with AdamW at a large learning rate a hundredfold a step, and hide errors.

A tensor that tp or dp splits is compared by the first of the ranks that share it. Where it is replicated, each rank compares
the copy that it has itself, and so does the last stage with its copy of a tied embedding.

Differences are shares of a tensor's own scale, because a sum that is split adds in another order and each element then
carries an error of about that size. Two scales need care:

- A gradient may be nothing but rounding: that of a key bias is exactly zero where positions are learned, as softmax ignores a
  shift. The scale of a gradient is therefore at least NOISE of the whole gradient's norm.
- AdamW divides an element's gradient by its own size, so it makes a step of full size out of rounding alone. Updated weights
  are compared where the gradient at every step so far is at least CLEAR times the largest difference seen in that tensor's gradient:
  there the step is certain to about 1/CLEAR. Their scale is the step's largest update, plus the rounding of the weight itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from tptrain.checkpoint.hugging_face.weights import load_weights
from tptrain.config import Config
from tptrain.data.dataset import open_data
from tptrain.mesh import Mesh, build_mesh, own_device
from tptrain.share import ModelShare
from tptrain.tensor_parallel.parameter import local_part
from tptrain.trainer import Trainer
from tptrain.verdict import TENSORS, UPDATE_LIMIT

NOISE = 1e-5
"""A gradient whose largest element is below this share of the whole gradient's norm is judged as if it were this large."""
CLEAR = 1e4
"""How far an element's gradient must stand above the difference in its tensor for its update to be compared."""

Look = Callable[[str, int, Iterator[tuple[str, Tensor]]], None]
"""Sees all tensors of one moment: start, gradient or update; the step; (name, whole tensor on the CPU) of each parameter."""


@dataclass
class Difference:
    """The largest difference in one tensor."""

    share: float
    """Of the tensor's scale; nan where the tensor holds one."""
    index: list[int]
    """Where in the whole tensor."""


@dataclass
class Compared:
    """One parameter, as one rank found it."""

    name: str
    rank: int
    elements: int
    initial: int
    """Elements that started with other bits."""
    initial_index: list[int]
    """The first of them."""
    gradients: list[Difference] = field(default_factory=list)
    """By step."""
    updates: list[Difference] = field(default_factory=list)
    """Of the weights after each step."""
    digests: list[str] = field(default_factory=list)
    """Of the weights' bits after each step: copies of one parameter must have the same."""
    left_out: int = 0
    """Elements whose last update was not compared: their gradient is not clear of rounding."""
    noise: float = 0.0
    """Largest absolute difference of the gradient so far."""


# ---- what ranks run --------------------------------------------------------------------------------------


def run_twin(config: Config, run_dir: Path, store_dir: Path) -> dict[str, Any]:
    """Run check.steps steps in one process, and keep every tensor in a folder beside `run_dir`.

    Returns loss and grad_norm by step, and the parameters' names.
    """
    folder, names = run_dir.parent / TENSORS, []

    def keep(moment: str, step: int, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            file = _file(folder, moment, step, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tensor, file)
            if moment == "start":
                names.append(name)

    _, measured = _run(config, store_dir, keep)
    (folder / "measured.json").write_text(json.dumps(measured))
    return {**measured, "names": names}


def run_layout(config: Config, run_dir: Path, store_dir: Path) -> dict[str, Any]:
    """Run check.steps steps under the layout, each tensor compared with the one process's. Every rank calls this.

    Returns loss and grad_norm by step, and on rank 0 all ranks' `Compared`, as dicts, in `parameters`.
    """
    folder = run_dir.parent / TENSORS
    norms = json.loads((folder / "measured.json").read_text())["grad_norm"]
    found: list[Compared] = []

    def compare(moment: str, step: int, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for place, (name, tensor) in enumerate(tensors):  # always in the same order; a tied embedding may come twice
            expected = _load(folder, moment, step, name)
            if moment == "start":
                found.append(_compare_start(name, tensor, expected))
            elif moment == "gradient":
                _compare_gradient(found[place], tensor, expected, NOISE * norms[step - 1])
            else:
                _compare_update(found[place], tensor, expected, folder, step)

    mesh, measured = _run(config, store_dir, compare, lambda share, step: _take_over(share, folder, step))
    gathered: list[Any] | None = [None] * mesh.world.size() if dist.get_rank() == 0 else None
    dist.gather_object([asdict(one) for one in found], gathered, dst=0, group=mesh.world)
    return {**measured, "parameters": [one for rank in gathered or () for one in rank]}


def _run(
    config: Config, store_dir: Path, look: Look, after: Callable[[ModelShare, int], None] | None = None
) -> tuple[Mesh, dict[str, list[float]]]:
    """Build what training builds, and take check.steps steps, with a look at the start, at each gradient and at each update.

    after: called with the rank's share of the model and the step when all has been seen of it.
    """
    device = own_device(config.hardware.device)
    mesh = build_mesh(config.parallel, device, config.launch.timeout_seconds)
    trainer = Trainer(config, mesh, open_data(config, store_dir))
    if config.train.init_from is not None:
        load_weights(config.train.init_from, config.model, trainer.share.named_parameters())
    measured: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    look("start", 0, _whole(trainer.share, gradients=False))
    for step in range(1, config.check.steps + 1):
        totals = trainer.compute_gradients()
        look("gradient", step, _whole(trainer.share, gradients=True))
        result = trainer.update(totals)
        if result.facts()[1]:
            raise FloatingPointError(f"the loss is {result.loss} and the gradient norm {result.grad_norm}: training has diverged")
        look("update", step, _whole(trainer.share, gradients=False))
        if after is not None:
            after(trainer.share, step)
        measured["loss"].append(result.loss)
        measured["grad_norm"].append(result.grad_norm)
    trainer.close()
    return mesh, measured


# ---- whole tensors ---------------------------------------------------------------------------------------


def _whole(share: ModelShare, gradients: bool) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's weights or gradient, gathered and on the CPU, where this rank is one of those to look at it.

    All ranks that share stages walk through it together, to the end, as each gathering takes all of them.
    """
    for name, parameter in share.named_parameters():
        tensor = parameter.detach()
        if gradients:
            tensor = torch.zeros_like(tensor) if parameter.grad is None else parameter.grad
        assert isinstance(tensor, DTensor), f"{name} has no label"
        with _quiet_gathering():
            whole, place = tensor.full_tensor(), tensor.device_mesh.get_coordinate()
        assert place is not None
        if all(at == 0 for at, placement in zip(place, tensor.placements, strict=True) if not isinstance(placement, Replicate)):
            yield name, whole.cpu()


@torch.no_grad()
def _take_over(share: ModelShare, folder: Path, step: int) -> None:
    """Give this rank's part of each parameter the value that it has in the one process after `step`."""
    for name, parameter in share.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} has no label"
        mesh, part = parameter.device_mesh, local_part(parameter)
        whole = _load(folder, "update", step, name).to(part.device)
        split = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(placements=parameter.placements)
        part.copy_(split.to_local())


@contextlib.contextmanager
def _quiet_gathering() -> Iterator[None]:
    """Keep torch from advising a faster way to gather over two mesh dimensions: a check is no training."""
    logger = logging.getLogger("torch.distributed.tensor")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _file(folder: Path, moment: str, step: int, name: str) -> Path:
    """Where the one process keeps a tensor."""
    return folder / f"{moment}-{step}" / f"{name}.pt"


def _load(folder: Path, moment: str, step: int, name: str) -> Tensor:
    tensor: Tensor = torch.load(_file(folder, moment, step, name), weights_only=True)
    return tensor


# ---- comparing one tensor --------------------------------------------------------------------------------


def _compare_start(name: str, tensor: Tensor, expected: Tensor) -> Compared:
    """Bit by bit."""
    other = tensor.view(torch.int32) != expected.view(torch.int32)
    count = int(other.sum())
    return Compared(name, dist.get_rank(), tensor.numel(), count, _index(int(other.int().argmax()), tensor) if count else [])


def _compare_gradient(found: Compared, tensor: Tensor, expected: Tensor, least_scale: float) -> None:
    """As a share of the tensor's largest element."""
    difference = (tensor - expected).abs()
    found.gradients.append(_largest(difference, max(float(expected.abs().max()), least_scale)))
    found.noise = float(torch.maximum(difference.max(), torch.tensor(found.noise)))


def _compare_update(found: Compared, tensor: Tensor, expected: Tensor, folder: Path, step: int) -> None:
    """As a share of the tensor's largest update, over elements whose gradients are clear of rounding."""
    found.digests.append(hashlib.sha256(tensor.contiguous().numpy().data).hexdigest())
    before = _load(folder, "update", step - 1, found.name) if step > 1 else _load(folder, "start", 0, found.name)
    update = float((expected - before).abs().max())
    rounding = 2 * torch.finfo(tensor.dtype).eps * float(expected.abs().max())  # of the weight decay and of the step
    difference = (tensor - expected).abs()
    unclear = torch.zeros_like(tensor, dtype=torch.bool)
    for earlier in range(1, step + 1):
        unclear |= _load(folder, "gradient", earlier, found.name).abs() < CLEAR * found.noise
    difference[unclear & difference.isfinite()] = 0
    found.left_out = int(unclear.sum())
    found.updates.append(_largest(difference, update + rounding / UPDATE_LIMIT))


def _largest(difference: Tensor, scale: float) -> Difference:
    """The largest of `difference` and where it is; a nan counts as larger than all."""
    place = int(difference.argmax())
    largest = float(difference.flatten()[place])
    return Difference(largest / scale if scale else 0.0 if largest == 0 else math.inf, _index(place, difference))


def _index(place: int, tensor: Tensor) -> list[int]:
    """Number `place` of the flattened tensor as an index."""
    return [int(index) for index in torch.unravel_index(torch.tensor(place), tensor.shape)]
