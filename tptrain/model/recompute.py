"""Activations that are made again in backward rather than kept (Korthikanti et al. 2022, arXiv:2205.05198).

    none        all is kept
    selective   what is cheap to make and large to keep goes: norms' and activation functions' outputs (`forgetting`), and
                attention's weights where dropout needs them as a matrix (`remade`)
    full        of a block, only its input is kept (`remade`)

Nothing here touches random states: dropout draws from named streams, and draws the same again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def remade(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments), of which only the arguments are kept; backward calls the function once more."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


@contextlib.contextmanager
def forgetting(tensor: Tensor, remake: Callable[[], Tensor], enabled: bool) -> Iterator[None]:
    """What the block's operations would keep of `tensor` for backward, they get from `remake` when they need it.

    remake: makes the same values; its own inputs are kept. For a tensor that several operations keep, it is called once for each.
    """
    if not enabled or not torch.is_grad_enabled():
        yield
        return
    place = _place(tensor)  # the hooks outlive the block and must not hold the tensor

    def pack(kept: Tensor) -> Tensor | None:
        return None if _place(kept) == place else kept

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return remake()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and its shape; also of one without values, which has no address."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
