"""What the tests of the model share: both families as small configs, a batch, a stage compared with its twin, and counters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.model.plain_gpt import Drop, PlainGPT, copy_weights, our_name, plain_gpt
from tests.support import small_config
from tests.tensor_parallel.support import part, whole_gradient
from tptrain.config import ModelConfig
from tptrain.mesh import Mesh
from tptrain.model.gpt import Execution, GPTStage
from tptrain.tensor_parallel import communication
from tptrain.tensor_parallel.communication import all_reduce_flat
from tptrain.tensor_parallel.parameter import partial_gradients
from tptrain.tensor_parallel.random import Stream, keep_mask

CPU = torch.device("cpu")
PLAIN = Execution()
SAMPLES, LENGTH = 3, 12
"""A batch's shape: not square, shorter than max_seq_len, and split evenly by 2 and 4."""


def gpt2(**changes: Any) -> ModelConfig:
    """A small model of the first family."""
    return _model({"num_layers": 2}, changes)


def llama(**changes: Any) -> ModelConfig:
    """A small model of the second: 8 heads of 4, two a key/value head; eps and theta are such that they matter at this size."""
    family = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
    sizes = {"num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "rope_theta": 100.0, "norm_eps": 0.05}
    return _model(family | sizes, changes)


def _model(family: dict[str, Any], changes: dict[str, Any]) -> ModelConfig:
    return small_config(**{f"model__{key}": value for key, value in (family | changes).items()}).model


FAMILIES: dict[str, Callable[..., ModelConfig]] = {"gpt2": gpt2, "llama": llama}


def batch(model: ModelConfig, samples: int = SAMPLES, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Inputs and targets [samples, length]; two targets are to be ignored."""
    rows = torch.randint(model.vocab_size, (samples, length + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[0, 3] = targets[-1, length - 1] = -100
    return inputs, targets


def stage_like(twin: PlainGPT, model: ModelConfig, mesh: Mesh, execution: Execution = PLAIN) -> GPTStage:
    """The whole model as one stage, with the twin's values."""
    stage = GPTStage(model, 0, model.num_layers, mesh.tp, CPU, execution)
    copy_weights(twin, stage)
    return stage


def sum_partial_gradients(stage: nn.Module, mesh: Mesh) -> None:
    """What the trainer does after the last backward."""
    gradients = partial_gradients(stage)
    if gradients and mesh.tp_size > 1:
        all_reduce_flat(gradients, mesh.tp_group)


def dropping(model: ModelConfig, stream: Stream | None) -> Drop:
    """Dropout for the twin: each place's mask is drawn from the stream of its name."""

    def drop(place: str, x: Tensor) -> Tensor:
        if stream is None:
            return x
        return x * keep_mask(Stream(stream.seed, stream.first_sample, f"/{place}"), x.shape, model.dropout, CPU)

    return drop


def check_against_twin(mesh: Mesh, model: ModelConfig, execution: Execution = PLAIN, stream: Stream | None = None) -> None:
    """Every logit, the loss and every gradient of a stage split over mesh.tp equal those of the twin on one process."""
    about = f"{model} {execution} tp {mesh.tp_size}"
    twin = plain_gpt(model)
    stage = stage_like(twin, model, mesh, execution)
    inputs, targets = batch(model)

    expected_logits = twin(inputs, dropping(model, stream))
    logits = part(expected_logits, -1, mesh.tp_size, mesh.tp_rank)
    assert_close(stage(inputs, stream=stream), logits, rtol=1e-5, atol=5e-5, msg=lambda text: f"{about}: {text}")

    expected = F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    loss = stage(inputs, targets, stream)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{about}: {text}")
    (loss / 34).backward()  # of 3 x 12 tokens, 2 don't count
    (expected / 34).backward()
    sum_partial_gradients(stage, mesh)
    for name, parameter in twin.named_parameters():
        gradient = whole_gradient(stage.get_parameter(our_name(name)))
        assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{about} {n}: {text}")
    assert {our_name(name) for name, _ in twin.named_parameters()} == {name for name, _ in stage.named_parameters()}


@contextlib.contextmanager
def communications() -> Iterator[dict[str, int]]:
    """`with communications() as counts`: what `communication.py` is asked to start, by name, whatever it makes of that."""
    counts: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "start_all_reduce", "start_all_gather", "start_reduce_scatter"):
            original = getattr(communication, name)
            users = [
                module
                for key, module in list(sys.modules.items())
                if key.startswith("tptrain.") and getattr(module, name, None) is original
            ]
            for module in users:
                stack.enter_context(mock.patch.object(module, name, counting(name.removeprefix("start_"), original)))
        yield counts
