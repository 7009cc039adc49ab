"""Data parallelism by `torch.distributed.fsdp.fully_shard`, set up for a pipeline.

Each rank of a dp group keeps 1/dp of the fp32 weights, gradients and optimizer state. The weights are gathered once a
step, stay gathered over all its micro-batches, and the gradients are summed over dp once, inside the last backward, or after
the last weight gradient where these are put off.
The sum is no mean: the loss is already divided by the global token count.

bf16 is `fully_shard`'s mixed precision: bf16 weights and activations, fp32 gradient sums. With dp=1 there is nothing to shard,
and the layers make the bf16 copies of their fp32 weights themselves (`LabelledModule`), with the same arithmetic and fewer copies.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tptrain.mesh import Mesh


class DataParallel:
    """The dp side of one stage. With dp=1 nothing is wrapped."""

    def __init__(self, stage: nn.Module, units: list[nn.Module], mesh: Mesh, dtype: torch.dtype) -> None:
        """Wrap `stage` and, as separate all-gathers, each of `units` inside it."""
        self.modules: list[FSDPModule] = []
        self._syncing: bool | None = None
        self._sums_in_place = dtype == torch.float32  # else gradients are of `dtype` until a backward ends
        if mesh.dp_size == 1:
            return
        # Inputs stay as they are: activations have the dtype already, and the angles of rotary positions must keep theirs.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

        def dp_placement(parameter: nn.Parameter) -> Shard:
            return Shard(dp_dimension(parameter, mesh.dp_size))

        for module in [*units, stage]:
            fully_shard(module, mesh=mesh.dp, reshard_after_forward=False, shard_placement_fn=dp_placement, mp_policy=policy)
            wrapped = cast(FSDPModule, module)
            wrapped.set_force_sum_reduction_for_comms(True)  # gloo can't divide while it reduces
            wrapped.set_gradient_divide_factor(1.0)
            # Weights stay gathered until they are done with. fully_shard's own guess of what backward needs next, by the order of the
            # forwards, would in some schedules gather once more what has just been given back; itself is always there.
            wrapped.set_modules_to_backward_prefetch([wrapped])
            self.modules.append(wrapped)

    def before_backward(self, is_last: bool) -> None:
        """Reduce gradients, and give the gathered weights back, in the step's last backward alone."""
        if self.modules and is_last != self._syncing:
            root = self.modules[-1]
            root.set_requires_gradient_sync(is_last)
            root.set_reshard_after_backward(is_last)
            root.set_is_last_backward(is_last)
            self._syncing = is_last

    def after_weight_gradients(self, is_last: bool) -> None:
        """Do for a micro-batch's put-off weight gradients what the end of its backward did without them: in mixed precision add them
        to the fp32 sums; after the step's last ones reduce gradients, all of one dtype, and give the gathered weights back.
        """
        if self.modules and not self._sums_in_place:
            self._end_backward(is_last=False)
        if self.modules and is_last:
            self._end_backward(is_last=True)

    def _end_backward(self, is_last: bool) -> None:
        """`fully_shard` offers this to nobody but its own hook at the end of a backward, which is called here as
        `torch.distributed.pipelining` calls it."""
        self.before_backward(is_last)
        fully_shard.state(self.modules[-1])._root_post_backward_final_callback()  # type: ignore[attr-defined]

    def release(self) -> None:
        """Give the gathered weights back after forwards without a backward; the parameters are the fp32 shards again."""
        for module in self.modules:
            module.reshard()


def dp_dimension(parameter: torch.Tensor, dp_size: int) -> int:
    """The dimension that dp splits: one that tp leaves alone and dp divides, if there is one, else the first."""
    split_by_tp = {p.dim for p in parameter.placements if isinstance(p, Shard)} if isinstance(parameter, DTensor) else set()
    free = [dim for dim in range(parameter.ndim) if dim not in split_by_tp]
    return next((dim for dim in free if parameter.shape[dim] % dp_size == 0), 0)
