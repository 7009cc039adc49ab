"""Parameters that say how they are split.

Each parameter is a DTensor over the tp mesh whose placement is `Shard(dim)` or `Replicate()`. The label is the only
record of the split: initial values, gradient sums, the norm and checkpoints all read it. Layers compute with
`local(parameter)`, a plain tensor.

Sizes that tp does not divide need no padding: rank i of n holds rows [ceil(size/n) * i, ceil(size/n) * (i+1)), cut
off at the end, so the last ranks hold fewer rows, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def shard_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """First and one-past-last element of part `index` of `parts`.

    >>> [shard_bounds(257, 4, i) for i in range(4)]
    [(0, 65), (65, 130), (130, 195), (195, 257)]
    """
    step = -(-size // parts)
    return min(index * step, size), min((index + 1) * step, size)


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

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[str, Tensor] = {}

    def part(self, name: str) -> Tensor:
        """This rank's part of parameter `name`, a plain tensor in compute_dtype.

        Forward: the part. Backward: adds the part's gradient to the parameter's, see `local`.
        """
        parameter = getattr(self, name)
        values = local_part(parameter)
        if values.dtype != self.compute_dtype:
            if name not in self._copies:
                self._copies[name] = values.to(self.compute_dtype)
            values = self._copies[name]
        return local(parameter, values)

    def bias_part(self) -> Tensor | None:
        """`part("bias")`, or None for a layer without a bias."""
        return None if self.bias is None else self.part("bias")


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Let all labelled layers of `module` compute in `dtype`; their parameters stay as they are."""
    for layer in module.modules():
        if isinstance(layer, LabelledModule):
            layer.compute_dtype = dtype


def drop_copies(module: nn.Module) -> None:
    """Let the labelled layers of `module` copy their weights anew at the next use, because these may have changed."""
    for layer in module.modules():
        if isinstance(layer, LabelledModule):
            layer._copies.clear()


def local(parameter: Tensor, values: Tensor | None = None) -> Tensor:
    """This rank's part of a labelled parameter as a plain tensor; `values` stands in for it in another precision.

    Forward: the part. Backward: adds the part's gradient to `parameter.grad`, labelled as the parameter is and in its dtype. The
    addition is made here, on plain tensors, as autograd's own on DTensors takes longer than a small layer.
    """
    values = local_part(parameter) if values is None else values
    return _Local.apply(parameter, values) if torch.is_grad_enabled() else values


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, as a plain tensor that shares its memory. Not differentiable."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: DTensor, values: Tensor) -> Tensor:
        ctx.parameter = parameter
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        parameter = ctx.parameter
        if parameter.grad is not None:
            parameter.grad.to_local().add_(grad)
            return None, None
        # A bias's gradient may be the very memory that flows on to other layers; a matrix's comes from a product or a look-up.
        grad = grad.to(parameter.dtype, copy=grad.ndim < 2)
        shape, stride = parameter.shape, parameter.stride()
        parameter.grad = DTensor.from_local(grad, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
        return None, None
