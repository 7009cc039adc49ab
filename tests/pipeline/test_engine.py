"""The engine with a toy stage, against the serial composition of all the stages."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import mesh_of, random
from tptrain.pipeline.actions import with_transfers
from tptrain.pipeline.engine import PipelineEngine
from tptrain.pipeline.schedules import SCHEDULES, forward_only
from tptrain.pipeline.transfer import Transfer

ROWS, WIDTH = 3, 5
SCALE = torch.tensor(0.37, dtype=torch.float64)


class Handle:
    """Stands for what a micro-batch keeps for its backward."""


class ToyStage(nn.Module):
    """tanh(linear(x)); on the last stage, with targets, a summed loss. Counts the micro-batches whose saved tensors live."""

    def __init__(self, index: int, stages: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.linear.weight.data = random(WIDTH, WIDTH, seed=index)
        self.linear.bias.data = random(WIDTH, seed=100 + index)
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.handles: list[weakref.ref[Handle]] = []
        self.most = 0
        self.grad_enabled: list[bool] = []
        self.outputs: list[weakref.ref[Tensor]] = []

    @property
    def live(self) -> int:
        return sum(handle() is not None for handle in self.handles)

    def forward(self, x: Tensor, targets: Tensor | None, micro_batch: int) -> Tensor:
        assert x.shape == (ROWS, WIDTH)
        assert x.is_leaf
        assert x.requires_grad == (torch.is_grad_enabled() and not self.is_first), "a received activation needs a gradient"
        assert targets is None or self.is_last
        self.grad_enabled.append(torch.is_grad_enabled())
        handle = Handle()
        self.handles.append(weakref.ref(handle))

        def pack(tensor: Tensor, handle: Handle = handle) -> tuple[Tensor, Handle]:
            return tensor, handle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
            y = torch.tanh(self.linear(x))
            if targets is not None:
                y = ((y - targets) ** 2).sum()
        del handle, pack
        self.most = max(self.most, self.live)
        self.outputs.append(weakref.ref(y))
        return y


def micro_batches(count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Each one different, and of different weight in the loss."""
    return [random(ROWS, WIDTH, seed=200 + m) for m in range(count)], [random(ROWS, WIDTH, seed=300 + m) * (m + 1) for m in range(count)]


def serial(stages: int, count: int) -> tuple[list[ToyStage], Tensor, list[Tensor]]:
    """All stages with their gradients, the summed loss, and each micro-batch's output; no pipeline."""
    parts = [ToyStage(i, stages) for i in range(stages)]
    total, outputs = torch.zeros(()), []
    for x, target in zip(*micro_batches(count), strict=True):
        for part in parts:
            x = torch.tanh(part.linear(x))
        outputs.append(x.detach())
        total = total + ((x - target) ** 2).sum()
    (total * SCALE.item()).backward()
    return parts, total.detach(), outputs


def engine_of(mesh) -> tuple[PipelineEngine, ToyStage]:
    stage = ToyStage(mesh.pp_rank, mesh.pp_size)
    return PipelineEngine(stage, mesh.pp_rank, mesh.pp_size, Transfer(mesh, (ROWS, WIDTH), torch.float32)), stage


def nothing_is_left(engine: PipelineEngine) -> None:
    assert not engine._live
    assert not engine._receives
    assert not engine._gradients
    assert not engine._activations
    assert not engine.transfer._sends


@pytest.mark.parametrize("world", [1, 2, 4])
def test_engine(world: int) -> None:
    run_ranks(world, check_all)


def check_all(rank: int) -> None:
    world = torch.distributed.get_world_size()
    mesh = mesh_of(pp=world)
    for name in SCHEDULES:
        for m in range(1, 7):
            check_training(mesh, name, m)
    check_two_steps_accumulate(mesh)
    for m in (1, 2, 5):
        check_inference(mesh, m)
    if world == 4:
        check_training(mesh_of(pp=2, dp=2), "1f1b", 3)


def check_training(mesh, name: str, m: int) -> None:
    s, p = mesh.pp_rank, mesh.pp_size
    engine, stage = engine_of(mesh)
    actions = with_transfers(SCHEDULES[name](p, 1, m))[s]
    inputs, targets = micro_batches(m)
    asked: list[bool] = []
    live_before_backward: list[int] = []

    def before_backward(is_last: bool) -> None:
        asked.append(is_last)
        live_before_backward.append(stage.live)
        assert len(engine._live) == stage.live, "saved tensors of a micro-batch that is done are still held"

    loss = engine.train(actions, inputs if s == 0 else None, targets if s == p - 1 else None, SCALE, before_backward)

    parts, expected, _ = serial(p, m)
    where = f"{name}, stage {s} of {p}, {m} micro-batches"
    for parameter in ("linear.weight", "linear.bias"):
        ours, theirs = stage.get_parameter(parameter).grad, parts[s].get_parameter(parameter).grad
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, n=parameter: f"{where}, {n}: {text}")
    assert loss.dtype == torch.float64
    assert_close(loss, expected.double() if s == p - 1 else torch.zeros((), dtype=torch.float64), rtol=1e-5, atol=1e-5)

    assert asked == [False] * (m - 1) + [True], "only the stage's last backward may reduce over dp"
    peak = m if name == "gpipe" else min(p - s, m)
    assert stage.most == peak, f"{where}: kept {stage.most} micro-batches, the schedule says {peak}"
    assert max(live_before_backward) == peak
    assert all(stage.grad_enabled)
    nothing_is_left(engine)
    assert stage.live == 0, "a micro-batch's activations outlive the step"
    assert all(output() is None for output in stage.outputs), "a micro-batch's output outlives the step"
    if s == 0:
        assert all(x.grad is None for x in inputs)


def check_two_steps_accumulate(mesh) -> None:
    engine, stage = engine_of(mesh)
    actions = with_transfers(SCHEDULES["1f1b"](mesh.pp_size, 1, 3))[mesh.pp_rank]
    losses = [engine.train(actions, *micro_batches(3), SCALE, lambda is_last: None) for _ in range(2)]
    parts, _, _ = serial(mesh.pp_size, 3)
    assert losses[0].equal(losses[1])
    assert_close(stage.linear.weight.grad, 2 * parts[mesh.pp_rank].linear.weight.grad, rtol=1e-4, atol=1e-5)


def check_inference(mesh, m: int) -> None:
    s, p = mesh.pp_rank, mesh.pp_size
    engine, stage = engine_of(mesh)
    actions = with_transfers(forward_only(range(p), m))[s]
    inputs, targets = micro_batches(m)
    _, total, expected = serial(p, m)
    for given in (None, targets):
        outputs = engine.infer(actions, inputs if s == 0 else None, given)
        assert len(outputs) == (m if s == p - 1 else 0)
        assert not any(output.requires_grad for output in outputs)
        if outputs and given is None:
            assert_close(torch.stack(outputs), torch.stack(expected), rtol=1e-5, atol=1e-5)
        elif outputs:
            losses = [((y - target) ** 2).sum() for y, target in zip(expected, targets, strict=True)]
            assert_close(torch.stack(outputs), torch.stack(losses), rtol=1e-5, atol=1e-4)
            assert_close(sum(outputs), total, rtol=1e-5, atol=1e-4)
        del outputs
        nothing_is_left(engine)
        assert all(output() is None for output in stage.outputs), "an output outlives the evaluation"
    assert not any(stage.grad_enabled)
    assert all(parameter.grad is None for parameter in stage.parameters())


def test_training_goes_on_where_inference_stopped() -> None:
    """The two may alternate on one engine: nothing of the one is seen by the other."""
    transfer: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu")), flush=lambda: None)
    engine = PipelineEngine(ToyStage(0, 1), 0, 1, transfer)
    x, target = micro_batches(1)
    training, evaluation = SCHEDULES["1f1b"](1, 1, 1)[0], forward_only(range(1), 1)[0]
    first = engine.train(training, x, target, SCALE, lambda is_last: None)
    (evaluated,) = engine.infer(evaluation, x, target)
    again = engine.train(training, x, target, SCALE, lambda is_last: None)
    assert first.equal(again)
    assert_close(evaluated.double(), first)
