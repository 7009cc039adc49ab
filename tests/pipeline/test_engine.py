"""The engine with a toy stage, against the serial composition of all the stages."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.tensor_parallel.support import mesh_of, random
from tptrain.pipeline.actions import COMPUTATIONS, Action, Kind, placement, with_transfers
from tptrain.pipeline.engine import PipelineEngine
from tptrain.pipeline.schedules import SCHEDULES, forward_only
from tptrain.pipeline.transfer import Transfer
from tptrain.pipeline.validate import validate
from tptrain.tensor_parallel.deferral import Deferral

ROWS, WIDTH = 3, 5
SCALE = torch.tensor(0.37, dtype=torch.float64)


class Handle:
    """Stands for what a micro-batch keeps for its backward."""


class Linear(torch.autograd.Function):
    """x W^T + b, whose weight gradient the deferral may put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, deferral: Deferral) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.deferral = weight, deferral
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight

        def make() -> None:
            made = grad.t() @ x
            weight.grad = made if weight.grad is None else weight.grad + made

        ctx.deferral.do(make)
        return grad @ weight.detach(), None, grad.sum(0), None


class ToyStage(nn.Module):
    """tanh(linear(x)); on the last stage, with targets, a summed loss. Counts the micro-batches whose saved tensors live."""

    def __init__(self, index: int, stages: int, deferral: Deferral | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.linear.weight.data = random(WIDTH, WIDTH, seed=index)
        self.linear.bias.data = random(WIDTH, seed=100 + index)
        self.deferral = deferral or Deferral()
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
            y = torch.tanh(Linear.apply(x, self.linear.weight, self.linear.bias, self.deferral))
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


class Recorder:
    """What the engine tells whoever holds the stages."""

    def __init__(self, deferral: Deferral, stages: dict[int, ToyStage]) -> None:
        self.deferral, self.stages = deferral, stages
        self.asked: dict[int, list[bool]] = {stage: [] for stage in stages}
        self.completed: list[int] = []
        self.put_off: list[weakref.ref[Any]] = []

    def before(self, stage: int, last: bool) -> None:
        self.asked[stage].append(last)

    def after_weight_gradients(self, stage: int, last: bool) -> None:
        self.completed += [stage] * last

    @contextmanager
    def putting_off(self) -> Iterator[list[Callable[[], None]]]:
        with self.deferral.putting_off() as work:
            yield work
        assert len(work) == 1, "one weight gradient a stage and micro-batch"
        self.put_off.append(weakref.ref(work[0]))


def engine_of(mesh, ranks: Sequence[int]) -> tuple[PipelineEngine, Recorder]:
    deferral = Deferral()
    stages = {stage: ToyStage(stage, len(ranks), deferral) for stage, rank in enumerate(ranks) if rank == mesh.pp_rank}
    return PipelineEngine(stages, ranks, Transfer(mesh, (ROWS, WIDTH), torch.float32)), Recorder(deferral, stages)


def nothing_is_left(engine: PipelineEngine) -> None:
    kept = (engine._live, engine._receives, engine._gradients, engine._activations, engine._weight_work, engine._lent)
    assert not any(kept)
    assert not engine.transfer._sends


@pytest.mark.parametrize("world", [1, 2, 4])
def test_engine(world: int) -> None:
    run_ranks(world, check_all)


STAGES_PER_RANK = {"gpipe": (1, 2), "1f1b": (1,), "interleaved": (1, 2, 3), "zb_h1": (1,), "zb_v": (2,)}


def check_all(rank: int) -> None:
    world = torch.distributed.get_world_size()
    mesh = mesh_of(pp=world)
    assert STAGES_PER_RANK.keys() == SCHEDULES.keys()
    for name, stages in STAGES_PER_RANK.items():
        for v in stages:
            for m in range(1, 10):
                check_training(mesh, name, v, m)
    check_two_steps_accumulate(mesh)
    for m in (1, 2, 5):
        check_inference(mesh, range(world), m)
        check_inference(mesh, [*range(world), *reversed(range(world))], m)
    if world == 4:
        check_training(mesh_of(pp=2, dp=2), "1f1b", 1, 3)


def check_training(mesh, name: str, v: int, m: int) -> None:
    s, p = mesh.pp_rank, mesh.pp_size
    schedule = with_transfers(SCHEDULES[name](p, v, m))
    ranks = placement(schedule)
    peaks = validate(schedule, m)
    engine, recorder = engine_of(mesh, ranks)
    inputs, targets = micro_batches(m)
    live = []
    backwards = [action for action in schedule[s] if action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT)]

    def before(stage: int, last: bool) -> None:
        live.append(sum(toy.live for toy in recorder.stages.values()))
        answered = {action._replace(kind=Kind.SEND_ACTIVATION) for action in backwards[: len(live) - 1]}
        assert not answered & engine.transfer._sends.keys(), "a send outlives its answer"
        Recorder.before(recorder, stage, last)

    recorder.before = before  # type: ignore[method-assign]
    loss = engine.train(schedule[s], inputs if s == ranks[0] else None, targets if s == ranks[-1] else None, SCALE, recorder)

    parts, expected, _ = serial(p * v, m)
    where = f"{name}, rank {s} of {p}, {v} stages a rank, {m} micro-batches"
    for number, stage in recorder.stages.items():
        for parameter in ("linear.weight", "linear.bias"):
            ours, theirs = stage.get_parameter(parameter).grad, parts[number].get_parameter(parameter).grad
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, n=parameter: f"{where}, {n}: {text}")
        split = {action.micro_batch for action in schedule[s] if action.kind is Kind.WEIGHT_GRADIENT and action.stage == number}
        asked = recorder.asked[number]
        assert len(asked) == m
        assert asked.count(True) + recorder.completed.count(number) == 1, "the stage's gradients are complete once"
        assert bool(split) or asked == [False] * (m - 1) + [True], "only the stage's last backward may reduce over dp"
        assert not split or not any(asked), "weight gradients that are still to come would not be reduced"
        assert all(stage.grad_enabled)
        assert stage.live == 0, "a micro-batch's activations outlive the step"
        assert all(output() is None for output in stage.outputs), "a micro-batch's output outlives the step"
    assert all(work() is None for work in recorder.put_off), "put-off work outlives the step"
    assert loss.dtype == torch.float64
    assert_close(loss, expected.double() if s == ranks[-1] else torch.zeros((), dtype=torch.float64), rtol=1e-5, atol=1e-5)
    if not recorder.put_off:
        assert max(live) == peaks[s], f"{where}: kept {max(live)} micro-batches, the schedule says {peaks[s]}"
    nothing_is_left(engine)
    if s == ranks[0]:
        assert all(x.grad is None for x in inputs)
    computed = [action for action in schedule[s] if action.kind in COMPUTATIONS]
    assert [span.action for span in engine.spans] == computed
    times = [time for span in engine.spans for time in (span.start, span.end)]
    assert times == sorted(times), "a rank computes one thing at a time"
    if p > 1:
        buffers = engine.transfer._free
        received = sum(action.kind in (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT) for action in schedule[s])
        assert len(buffers) <= received
        assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers), "a buffer was given back twice"
        if name == "1f1b" and m == 9:
            assert len(buffers) < received, "buffers go from micro-batch to micro-batch"


def check_two_steps_accumulate(mesh) -> None:
    ranks = range(mesh.pp_size)
    engine, recorder = engine_of(mesh, ranks)
    actions = with_transfers(SCHEDULES["1f1b"](mesh.pp_size, 1, 3))[mesh.pp_rank]
    losses = [engine.train(actions, *micro_batches(3), SCALE, recorder) for _ in range(2)]
    parts, _, _ = serial(mesh.pp_size, 3)
    assert losses[0].equal(losses[1])
    ours = recorder.stages[mesh.pp_rank].linear.weight.grad
    assert_close(ours, 2 * parts[mesh.pp_rank].linear.weight.grad, rtol=1e-4, atol=1e-5)


def check_inference(mesh, ranks: Sequence[int], m: int) -> None:
    s = mesh.pp_rank
    engine, recorder = engine_of(mesh, ranks)
    actions = with_transfers(forward_only(ranks, m))[s]
    inputs, targets = micro_batches(m)
    _, total, expected = serial(len(ranks), m)
    for given in (None, targets):
        outputs = engine.infer(actions, inputs if s == ranks[0] else None, given)
        assert len(outputs) == (m if s == ranks[-1] else 0)
        assert not any(output.requires_grad for output in outputs)
        if outputs and given is None:
            assert_close(torch.stack(outputs), torch.stack(expected), rtol=1e-5, atol=1e-5)
        elif outputs:
            losses = [((y - target) ** 2).sum() for y, target in zip(expected, targets, strict=True)]
            assert_close(torch.stack(outputs), torch.stack(losses), rtol=1e-5, atol=1e-4)
            assert_close(sum(outputs), total, rtol=1e-5, atol=1e-4)
        del outputs
        nothing_is_left(engine)
        assert [span.action for span in engine.spans] == [action for action in actions if action.kind is Kind.FORWARD]
        outlived = [output() for stage in recorder.stages.values() for output in stage.outputs]
        assert all(output is None for output in outlived), "an output outlives the evaluation"
    for stage in recorder.stages.values():
        assert not any(stage.grad_enabled)
        assert all(parameter.grad is None for parameter in stage.parameters())


def test_training_goes_on_where_inference_stopped() -> None:
    """The two may alternate on one engine: nothing of the one is seen by the other."""
    transfer: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu")), flush=lambda: None)
    engine = PipelineEngine({0: ToyStage(0, 1)}, [0], transfer)
    x, target = micro_batches(1)
    training, evaluation = SCHEDULES["1f1b"](1, 1, 1)[0], forward_only(range(1), 1)[0]
    first = engine.train(training, x, target, SCALE, Recorder(Deferral(), {0: None}))
    (evaluated,) = engine.infer(evaluation, x, target)
    again = engine.train(training, x, target, SCALE, Recorder(Deferral(), {0: None}))
    assert first.equal(again)
    assert_close(evaluated.double(), first)


@pytest.mark.parametrize("world", [3])
def test_a_stage_that_hands_its_input_on(world: int) -> None:
    """Its output and its input's gradient lie in the very buffers that were received into: these are not received into again."""
    run_ranks(world, check_handing_on)


def check_handing_on(rank: int) -> None:
    mesh, m = mesh_of(pp=3), 8
    last = ToyStage(2, 3)

    def stage(x: Tensor, targets: Tensor | None, micro_batch: int) -> Tensor:
        return last(x, targets, micro_batch) if rank == 2 else x.view(ROWS, WIDTH)

    inputs, targets = micro_batches(m)
    gradients: list[Tensor] = []
    for x in inputs:
        x.requires_grad_().register_hook(lambda gradient: gradients.append(gradient.clone()))
    engine = PipelineEngine({rank: stage}, range(3), Transfer(mesh, (ROWS, WIDTH), torch.float32))
    recorder = Recorder(Deferral(), {rank: last})
    outputs = engine.infer(with_transfers(forward_only(range(3), m))[rank], inputs, None)
    for output, x in zip(outputs, inputs, strict=False):
        assert_close(output, torch.tanh(last.linear(x)).detach())
    engine.train(with_transfers(SCHEDULES["1f1b"](3, 1, m))[rank], inputs, targets, SCALE, recorder)
    if rank == 0:
        for x, target, gradient in zip(inputs, targets, gradients, strict=True):
            twin = x.detach().requires_grad_()
            (((torch.tanh(last.linear(twin)) - target) ** 2).sum() * SCALE.float()).backward()
            assert_close(gradient, twin.grad)


@pytest.mark.parametrize("world", [2])
def test_put_off_work_that_reads_what_was_received(world: int) -> None:
    """Weight gradients made of the very buffer that a gradient was received into, after all other gradients have come."""
    run_ranks(world, check_late_weights)


def check_late_weights(rank: int) -> None:
    mesh, m = mesh_of(pp=2), 6
    parts = [ToyStage(index, 2) for index in range(2)]

    def stage(x: Tensor, targets: Tensor | None, micro_batch: int) -> Tensor:
        linear = parts[0].linear  # without a tanh behind it, the output's gradient is what the weight gradient is made of
        return parts[1](x, targets, micro_batch) if rank == 1 else Linear.apply(x, linear.weight, linear.bias, parts[0].deferral)

    computations = [
        [Action(kind, 0, n) for kind in (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT) for n in range(m)],
        [Action(kind, 1, n) for n in range(m) for kind in (Kind.FORWARD, Kind.BACKWARD)],
    ]
    inputs, targets = micro_batches(m)
    engine = PipelineEngine({rank: stage}, range(2), Transfer(mesh, (ROWS, WIDTH), torch.float32))
    engine.train(with_transfers(computations)[rank], inputs, targets, SCALE, Recorder(parts[0].deferral, {rank: parts[rank]}))
    if rank == 0:
        twin, last = ToyStage(0, 2).linear, ToyStage(1, 2).linear
        for x, target in zip(inputs, targets, strict=True):
            (((torch.tanh(last(twin(x))) - target) ** 2).sum() * SCALE.float()).backward()
        assert_close(parts[0].linear.weight.grad, twin.weight.grad)
