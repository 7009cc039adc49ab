"""Parameters that say how they are split, and where their gradients are added up.

Each parameter is a DTensor over the tp mesh whose placement is `Shard(dim)` or `Replicate()`. The label is the only
record of the split: initial values, the norm and checkpoints read it. Layers compute with plain tensors.

Gradients are added to `parameter.grad` here, not by autograd: a matrix product then adds itself to what earlier micro-batches
left, with no tensor in between, and autograd's own sum of DTensors would take longer than a small layer.

Sizes that tp does not divide need no padding: rank i of n holds rows [ceil(size/n) * i, ceil(size/n) * (i+1)), cut
off at the end, so the last ranks hold fewer rows, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tptrain.tensor_parallel.communication import shard_bounds
from tptrain.tensor_parallel.deferral import Deferral

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What layers compute in, by `train.precision`."""


def labelled_parameter(shape: Sequence[int], shard_dim: int | None, tp: DeviceMesh, device: torch.device) -> nn.Parameter:
    """An uninitialised fp32 parameter of the whole shape `shape`, split over `tp` along `shard_dim` (None: replicated).

    Only this rank's part is allocated.
    """
    local_shape = list(shape)
    if shard_dim is not None:
        start, stop = shard_bounds(shape[shard_dim], tp.size(), tp.get_local_rank())
        local_shape[shard_dim] = stop - start
    whole = torch.empty(tuple(shape), device="meta")
    placement = Replicate() if shard_dim is None else Shard(shard_dim)
    values = torch.empty(local_shape, device=device)
    return nn.Parameter(DTensor.from_local(values, tp, [placement], run_check=False, shape=whole.shape, stride=whole.stride()))


class LabelledModule(nn.Module):
    """A layer with labelled parameters, which computes with this rank's parts of them in `compute_dtype`.

    Where that is not the parameters' own dtype, one copy serves all micro-batches of a step; `drop_copies` ends its life. (A
    tensor's version number does not tell: updates of a DTensor leave that of its local tensor alone.)
    """

    compute_dtype = torch.float32
    deferral: Deferral | None = None
    """Who decides when a linear layer's weight gradient is made; None: at once."""
    partial_gradients: tuple[str, ...] = ()
    """Replicated parameters of which each tp rank makes a part of the gradient; the step sums them over tp, once."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[str, Tensor] = {}

    def values(self, name: str) -> Tensor:
        """This rank's part of parameter `name`, a plain tensor in compute_dtype. Not differentiable."""
        values = local_part(getattr(self, name))
        if values.dtype == self.compute_dtype:
            return values
        if name not in self._copies:
            self._copies[name] = values.to(self.compute_dtype)
        return self._copies[name]

    def part(self, name: str) -> Tensor:
        """The same with a gradient.

        Forward: the part. Backward: adds the part's gradient to the parameter's.
        """
        values = self.values(name)
        return _Part.apply(getattr(self, name), values) if torch.is_grad_enabled() else values

    def bias_part(self) -> Tensor | None:
        """`part("bias")`, or None for a layer without a bias."""
        return None if self.bias is None else self.part("bias")


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Let all labelled layers of `module` compute in `dtype`; their parameters stay as they are."""
    for layer in _labelled(module):
        layer.compute_dtype = dtype


def defer_by(module: nn.Module, deferral: Deferral) -> None:
    """Let `deferral` decide when the labelled layers of `module` make their weights' gradients."""
    for layer in _labelled(module):
        layer.deferral = deferral


def drop_copies(module: nn.Module) -> None:
    """Let the labelled layers of `module` copy their weights anew at the next use, because these may have changed."""
    for layer in _labelled(module):
        layer._copies.clear()


def partial_gradients(module: nn.Module) -> list[Tensor]:
    """This rank's parts of all gradients that are still to be summed over tp, in the order of the layers; they share memory."""
    gradients = [getattr(layer, name).grad for layer in _labelled(module) for name in layer.partial_gradients]
    return [local_part(gradient) for gradient in gradients if gradient is not None]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, as a plain tensor that shares its memory. Not differentiable."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


# ---- adding to a gradient: parameter.grad += ... -----------------------------------------------------------


def add_gradient(parameter: Tensor, gradient: Tensor, rows: slice | None = None) -> None:
    """Add this rank's part of a gradient, in any dtype. The tensor is kept if it is the first: the caller gives it away.

    rows: the rows of this rank's part that the gradient is for, where not all.
    """
    if parameter.grad is None and rows is None:
        _set_gradient(parameter, gradient.to(parameter.dtype))
    else:
        existing_gradient(parameter)[rows or slice(None)].add_(gradient)


def add_product(parameter: Tensor, y_grad: Tensor, x: Tensor, rows: slice | None = None) -> None:
    """Add y_grad^T x, the gradient of a linear layer's weight. y_grad: [n, out], x: [n, in]; rows as in `add_gradient`.

    No temporary is made where a gradient of the product's dtype already exists.
    """
    if parameter.grad is None and rows is None:
        _set_gradient(parameter, (y_grad.t() @ x).to(parameter.dtype))
        return
    total = existing_gradient(parameter)[rows or slice(None)]
    if total.dtype == x.dtype:
        total.addmm_(y_grad.t(), x)
    else:
        total.add_(y_grad.t() @ x)


def existing_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of the gradient, zeros where there is none yet; writing into it is adding to it."""
    if parameter.grad is None:
        _set_gradient(parameter, torch.zeros_like(local_part(parameter)))
    assert parameter.grad is not None
    return local_part(parameter.grad)


def _set_gradient(parameter: Tensor, values: Tensor) -> None:
    """Make `values` this rank's part of the gradient, labelled as the parameter is."""
    assert isinstance(parameter, DTensor)
    shape, stride = parameter.shape, parameter.stride()
    parameter.grad = DTensor.from_local(values, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:
        ctx.parameter = parameter
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        # The tensor may be the very memory that flows on to other layers.
        add_gradient(ctx.parameter, grad if ctx.parameter.grad is not None else grad.to(ctx.parameter.dtype, copy=True))
        return None, None


def _labelled(module: nn.Module) -> Iterator[LabelledModule]:
    return (layer for layer in module.modules() if isinstance(layer, LabelledModule))
