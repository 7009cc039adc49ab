"""A rank's share of the model: its pipeline stages, each split over tp, with the data parallelism around them.

What concerns gradients between backward and optimizer is here too: they are complete once `sum_gradients` is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tptrain.config import Config
from tptrain.data_parallel import DataParallel
from tptrain.mesh import Mesh
from tptrain.model.gpt import Execution, GPTStage
from tptrain.model.init import initialise
from tptrain.plan.pipeline import stage_layers
from tptrain.tensor_parallel.communication import all_reduce_flat
from tptrain.tensor_parallel.deferral import Deferral
from tptrain.tensor_parallel.parameter import compute_in, defer_by, drop_copies, local_part, partial_gradients

TIED = "embedding.weight"
"""The parameter that the first and the last stage both have, where embeddings are tied."""


class ModelShare:
    """The stages that this rank holds, initialised and ready to train."""

    def __init__(self, config: Config, mesh: Mesh, ranks: Sequence[int], dtype: torch.dtype) -> None:
        """config: resolved. ranks: the pipeline rank of each stage. dtype: to compute in."""
        self.config, self.mesh, self.ranks = config, mesh, ranks
        parallel = config.parallel
        execution = Execution(parallel.sequence_parallel, parallel.recompute, config.train.loss_chunk_tokens)
        self.deferral = Deferral()
        self.stages: dict[int, GPTStage] = {}
        self.data_parallel: dict[int, DataParallel] = {}
        for number, (first, last) in enumerate(stage_layers(config, ranks)):
            if ranks[number] != mesh.pp_rank:
                continue
            stage = GPTStage(config.model, first, last, mesh.tp, mesh.device, execution)
            initialise(stage, config.model, config.seed)
            compute_in(stage, dtype)
            defer_by(stage, self.deferral)
            self.stages[number] = stage
            self.data_parallel[number] = DataParallel(stage, list(stage.layers.values()), mesh, dtype)
        self.modules = nn.ModuleList(self.stages.values())
        self.is_first = any(stage.is_first for stage in self.stages.values())
        self.is_last = any(stage.is_last for stage in self.stages.values())

    # ---- parameters ------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter here by its name in the whole model; a tied embedding on both its stages comes twice."""
        for stage in self.stages.values():
            yield from stage.named_parameters()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The same with each name once: of a tied embedding the first stage's."""
        named: dict[str, nn.Parameter] = {}
        for name, parameter in self.named_parameters():
            named.setdefault(name, parameter)
        return named

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Those that count for the model, and are saved: all but a tied embedding's second copy, on the last of several stages."""
        return {name: parameter for name, parameter in self.parameters().items() if name != TIED or self.is_first}

    def repeat_tied(self, optimizer: torch.optim.Optimizer) -> None:
        """Where both copies of a tied embedding are here, give the second the values and the optimizer state of the first."""
        if not self._has_both_copies():
            return
        first, second = self._tied_copies()
        with torch.no_grad():
            local_part(second).copy_(local_part(first))
            for key, value in optimizer.state.get(first, {}).items():
                if isinstance(value, Tensor):
                    local_part(optimizer.state[second][key]).copy_(local_part(value))

    # ---- forward and backward ----------------------------------------------------------------------------------

    def begin(self, training: bool) -> None:
        """Before the first forward after an update of the weights, or of another kind."""
        drop_copies(self.modules)
        self.modules.train(training)

    def release(self) -> None:
        """Give gathered weights back after forwards without a backward."""
        for data_parallel in self.data_parallel.values():
            data_parallel.release()

    def before(self, stage: int, last: bool) -> None:
        """See `pipeline.engine.Backward`."""
        self.data_parallel[stage].before_backward(last)

    def after_weight_gradients(self, stage: int, last: bool) -> None:
        """See `pipeline.engine.Backward`."""
        self.data_parallel[stage].after_weight_gradients(last)

    def putting_off(self) -> AbstractContextManager[list[Callable[[], None]]]:
        """See `pipeline.engine.Backward`."""
        return self.deferral.putting_off()

    # ---- gradients -------------------------------------------------------------------------------------------

    def sum_gradients(self) -> None:
        """Add up what several ranks have only a part of each. Afterwards every gradient is that of the global batch."""
        self._sum_partial_gradients()
        self._sum_tied_embedding()

    def gradients(self) -> list[Tensor]:
        """All gradients here."""
        return [parameter.grad for _, parameter in self.named_parameters() if parameter.grad is not None]

    def counted_gradients(self) -> list[Tensor]:
        """The gradients that count for the model's norm: a tied embedding's once."""
        return [parameter.grad for parameter in self.owned_parameters().values() if parameter.grad is not None]

    def _sum_partial_gradients(self) -> None:
        """Sum over tp what each of its ranks has only a part of, in one message: norms and biases under sequence parallelism
        (a part of the sequence), shared key/value weights (a part of the query heads)."""
        gradients = partial_gradients(self.modules)
        if gradients and self.mesh.tp_size > 1:
            all_reduce_flat(gradients, self.mesh.tp_group)

    def _sum_tied_embedding(self) -> None:
        """Add the gradients of the embedding's two copies, one as the table and one as the head, on both."""
        if not self.config.model.tie_embeddings or len(self.ranks) == 1:
            return
        if self._has_both_copies():
            first, second = (copy.grad for copy in self._tied_copies())
            assert first is not None
            assert second is not None
            local_part(second).copy_(local_part(first).add_(local_part(second)))
        elif self.is_first or self.is_last:
            gradient = self.parameters()[TIED].grad
            assert gradient is not None
            assert self.mesh.embedding is not None, "the first and the last stage lie on the first and the last rank, or on one"
            dist.all_reduce(local_part(gradient), group=self.mesh.embedding)

    def _has_both_copies(self) -> bool:
        return self.config.model.tie_embeddings and len(self.ranks) > 1 and self.is_first and self.is_last

    def _tied_copies(self) -> tuple[nn.Parameter, nn.Parameter]:
        first, second = (self.stages[number].embedding.weight for number in (0, len(self.ranks) - 1))
        return first, second
