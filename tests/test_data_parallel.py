"""Data parallelism of a stage against the serial sum: values, what is sent and when, and where weights live in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tests.tensor_parallel.support import collectives, mesh_of, random
from tptrain.config import Config
from tptrain.data.dataset import Data
from tptrain.data_parallel import DataParallel, dp_dimension
from tptrain.mesh import Mesh
from tptrain.model.gpt import GPTStage
from tptrain.model.init import initialise
from tptrain.tensor_parallel.deferral import Deferral
from tptrain.tensor_parallel.parameter import compute_in, defer_by

CPU = torch.device("cpu")
SCALE = 1 / 64
# 257 rows: split by tp unevenly, so that dp takes the columns; a hidden size that 2 and 4 divide.
MODEL = small_config(model__num_layers=2).model
UNITS = MODEL.num_layers + 1  # the layers, and the stage around them


def build(mesh: Mesh, dtype: torch.dtype = torch.float32) -> tuple[GPTStage, DataParallel]:
    stage = GPTStage(MODEL, 0, MODEL.num_layers, mesh.tp, CPU)
    initialise(stage, MODEL, 1)
    compute_in(stage, dtype)
    return stage, DataParallel(stage, list(stage.layers.values()), mesh, dtype)


def batches(dp_rank: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """What this dp rank reads: other rows on each."""
    generator = torch.Generator().manual_seed(dp_rank)
    rows = [torch.randint(MODEL.vocab_size, (2, 9), generator=generator) for _ in range(count)]
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def step(stage: GPTStage, data_parallel: DataParallel, data: list[tuple[Tensor, Tensor]]) -> None:
    """Forwards and backwards of one step; gradients stay."""
    for i, (inputs, targets) in enumerate(data):
        loss = stage(inputs, targets)
        data_parallel.before_backward(i == len(data) - 1)
        (loss * SCALE).backward()


def serial_gradients(mesh: Mesh, count: int) -> dict[str, Tensor]:
    """Of the sum over all dp ranks' micro-batches; an unwrapped stage sees them all."""
    twin = GPTStage(MODEL, 0, MODEL.num_layers, mesh.tp, CPU)
    initialise(twin, MODEL, 1)
    for dp_rank in range(mesh.dp_size):
        for inputs, targets in batches(dp_rank, count):
            (twin(inputs, targets) * SCALE).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in twin.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.detach().full_tensor()


def count_of(counted: dict[str, int], word: str) -> int:
    return sum(count for name, count in counted.items() if word in name)


@pytest.mark.parametrize(("world", "layouts"), [(2, [{"dp": 2}]), (4, [{"dp": 4}, {"dp": 2, "tp": 2}])])
def test_fp32(world: int, layouts: list[dict[str, int]]) -> None:
    run_ranks(world, check_fp32, layouts)


def check_fp32(rank: int, layouts: list[dict[str, int]]) -> None:
    for layout in layouts:
        mesh = mesh_of(**layout)
        check_gradients_are_the_sum(mesh)
        check_one_reduction_a_step(mesh)
        check_weights_are_given_back(mesh)


def check_gradients_are_the_sum(mesh: Mesh) -> None:
    for count in (1, 3):
        stage, data_parallel = build(mesh)
        expected = serial_gradients(mesh, count)
        for _ in range(2):  # the second step starts from where the first one left the wrapping
            step(stage, data_parallel, batches(mesh.dp_rank, count))
            for name, parameter in stage.named_parameters():
                assert parameter.grad.dtype == torch.float32
                assert parameter.grad.placements == parameter.placements
                assert_close(whole(parameter.grad), expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
            stage.zero_grad()


def check_one_reduction_a_step(mesh: Mesh) -> None:
    """However many micro-batches: weights are gathered once and gradients reduced once, inside the last backward."""
    for count in (1, 2, 5):
        stage, data_parallel = build(mesh)
        data = batches(mesh.dp_rank, count)
        for _ in range(2):
            gathered, reduced = [], []
            for i, (inputs, targets) in enumerate(data):
                with collectives() as forward:
                    loss = stage(inputs, targets)
                data_parallel.before_backward(i == count - 1)
                with collectives() as backward:
                    (loss * SCALE).backward()
                gathered.append(count_of(forward, "allgather"))
                assert count_of(forward, "reduce_scatter") == count_of(backward, "allgather") == 0
                reduced.append(count_of(backward, "reduce_scatter"))
            assert gathered == [UNITS] + [0] * (count - 1)
            assert reduced == [0] * (count - 1) + [UNITS]
            stage.zero_grad()


def held(stage: GPTStage) -> int:
    """Elements that this rank's parameters hold."""
    return sum(parameter.data.to_local().numel() for parameter in stage.parameters())


def check_weights_are_given_back(mesh: Mesh) -> None:
    """After a step, and by `release` after forwards alone: fp32 shards of 1/dp, labelled over dp and tp."""
    twin = GPTStage(MODEL, 0, MODEL.num_layers, mesh.tp, CPU)
    initialise(twin, MODEL, 1)
    expected = {name: whole(parameter) for name, parameter in twin.named_parameters()}
    stage, data_parallel = build(mesh)
    data = batches(mesh.dp_rank, 2)

    def are_shards() -> None:
        for name, parameter in stage.named_parameters():
            assert parameter.dtype == torch.float32
            assert isinstance(parameter.data, DTensor), name
            assert any(isinstance(placement, Shard) for placement in parameter.placements), name
            assert torch.equal(whole(parameter), expected[name]), name
        assert held(stage) * mesh.dp_size == pytest.approx(held(twin), rel=0.01)

    are_shards()
    step(stage, data_parallel, data)
    are_shards()
    with torch.no_grad():
        for inputs, targets in data:
            stage(inputs, targets)
    with collectives() as counted, torch.no_grad():
        stage(*data[0])
    assert count_of(counted, "allgather") == 0, "weights stay gathered between forwards"
    assert held(stage) > held(twin) // mesh.dp_size * 1.5, "they are gathered now"
    data_parallel.release()
    are_shards()
    stage.zero_grad()
    step(stage, data_parallel, data)
    are_shards()


def test_bf16() -> None:
    run_ranks(1, check_bf16)
    run_ranks(2, check_bf16)


def check_bf16(rank: int) -> None:
    mesh = mesh_of(dp=torch.distributed.get_world_size())
    stage, data_parallel = build(mesh, torch.bfloat16)
    seen: dict[str, torch.dtype] = {}

    def note(name: str):
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            seen[name] = output.dtype

        return hook

    for name, module in stage.named_modules():
        if name and not name.endswith(("layers", "embedding")) and "." in name:
            module.register_forward_hook(note(name))
    inputs, targets = batches(mesh.dp_rank, 1)[0]
    loss = stage(inputs, targets)
    assert loss.dtype == torch.float32, "the loss is summed in fp32"
    assert len(seen) > 10
    assert set(seen.values()) == {torch.bfloat16}, seen
    data_parallel.before_backward(True)
    (loss * SCALE).backward()

    expected = serial_gradients(mesh, 1)
    once = {}
    for name, parameter in stage.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        once[name] = whole(parameter.grad)
        error = (once[name] - expected[name]).norm() / expected[name].norm()
        assert name.endswith("k.bias") or error < 0.03, f"{name}: {error}"  # the exact gradient of k's bias is zero
    stage.zero_grad()

    # Gradients of micro-batches are added in fp32: seven times the same bf16 numbers is seven times as much, to the last bit
    # of fp32. Added in bf16, the sums would be rounded.
    for i in range(7):
        loss = stage(inputs, targets)
        data_parallel.before_backward(i == 6)
        (loss * SCALE).backward()
    check_seven_times(stage, once)

    # The same where weight gradients are put off, and made one micro-batch after another.
    defer_by(stage, deferral := Deferral())
    for count in (1, 7):
        left = []
        for _ in range(count):
            loss = stage(inputs, targets)
            data_parallel.before_backward(False)
            with deferral.putting_off() as work:
                (loss * SCALE).backward()
            left.append(work)
        for i, work in enumerate(left):
            with torch.no_grad():
                for make in work:
                    make()
            data_parallel.after_weight_gradients(i == count - 1)
        if count == 1:
            once = {name: whole(parameter.grad) for name, parameter in stage.named_parameters()}
            stage.zero_grad()
    check_seven_times(stage, once)


def check_seven_times(stage: GPTStage, once: dict[str, Tensor]) -> None:
    for name, parameter in stage.named_parameters():
        assert_close(whole(parameter.grad), 7 * once[name], rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    stage.zero_grad()


def test_without_dp_nothing_is_wrapped() -> None:
    run_ranks(1, check_nothing_is_wrapped)


def check_nothing_is_wrapped(rank: int) -> None:
    mesh = mesh_of()
    assert build(mesh, torch.bfloat16)[1].modules == []
    stage, data_parallel = build(mesh)
    assert data_parallel.modules == []
    with collectives() as counted:
        step(stage, data_parallel, batches(0, 2))
    data_parallel.release()
    assert counted == {}
    expected = serial_gradients(mesh, 2)
    for name, parameter in stage.named_parameters():
        assert_close(whole(parameter.grad), expected[name])


def test_which_dimension_dp_splits() -> None:
    run_ranks(2, check_dimensions)


def check_dimensions(rank: int) -> None:
    tp = mesh_of(tp=2).tp
    cases = [
        ((8, 6), Shard(0), 2, 1),  # the one that tp leaves alone
        ((8, 6), Shard(1), 2, 0),
        ((257, 6), Shard(0), 2, 1),
        ((8, 6), Replicate(), 2, 0),
        ((5, 6), Replicate(), 2, 1),  # the one that dp divides
        ((5, 7), Replicate(), 2, 0),  # none: uneven
        ((8, 7), Shard(0), 2, 0),  # none that is free: both split the rows
        ((8,), Shard(0), 2, 0),
        ((6,), Replicate(), 4, 0),
    ]
    for shape, placement, dp_size, expected in cases:
        local = random(*shape, seed=1)
        if isinstance(placement, Shard):
            local = local.chunk(2, placement.dim)[rank]
        parameter = DTensor.from_local(local, tp, [placement], shape=torch.Size(shape), stride=random(*shape, seed=1).stride())
        assert dp_dimension(parameter, dp_size) == expected, (shape, placement)
    assert dp_dimension(torch.empty(5, 6), 2) == 1


def test_bf16_learns_as_fp32_does() -> None:
    """The copies of the weights that the layers compute with follow the optimizer, with and without dp and tp."""
    run_ranks(1, check_learning, [{}])
    run_ranks(2, check_learning, [{"dp": 2}, {"tp": 2}])


def check_learning(rank: int, layouts: list[dict[str, int]]) -> None:
    from tptrain.trainer import Trainer

    for layout in layouts:
        losses = {}
        for precision in ("fp32", "bf16"):
            layout_keys = {f"parallel__{axis}": size for axis, size in layout.items()}
            config = small_config(train__precision=precision, optimizer__lr=0.01, optimizer__grad_clip=None, **layout_keys)
            tokens = skewed_tokens(8 * 16 + 1, config.model.vocab_size)  # one global batch, again and again
            trainer = Trainer(config, mesh_of(**layout), Data.of_tokens(config, tokens))
            before = trainer.evaluate()["val_loss"]
            losses[precision] = [before, *(trainer.step().loss for _ in range(8)), trainer.evaluate()["val_loss"]]
            assert all(parameter.dtype == torch.float32 for parameter in trainer.share.modules.parameters())
        assert losses["fp32"][0] - losses["fp32"][-1] > 1, "eight steps must change the loss by far more than bf16 rounds"
        assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01), layout


def test_bf16_leaves_rotary_angles_in_fp32() -> None:
    """Rounded to bf16, the angles of positions 256 and 257 would be one."""
    run_ranks(1, check_angles, {})
    run_ranks(2, check_angles, {"dp": 2})


def check_angles(rank: int, layout: dict[str, int]) -> None:
    from tptrain.trainer import Trainer

    layout_keys = {f"parallel__{axis}": size for axis, size in layout.items()}
    config = small_config(train__precision="bf16", model__position="rope", **layout_keys)
    trainer = Trainer(config, mesh_of(**layout), Data.of_tokens(config, skewed_tokens(1000, config.model.vocab_size)))
    seen: list[torch.dtype] = []

    def keep(module: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        seen.extend(x.dtype for x in (inputs[0], inputs[1].cos, inputs[1].sin))  # type: ignore[attr-defined]

    next(iter(trainer.share.stages[0].layers.values())).attention.register_forward_pre_hook(keep)
    trainer.step()
    assert set(seen[0::3]) == {torch.bfloat16}
    assert set(seen[1::3]) | set(seen[2::3]) == {torch.float32}


# ---- the mean over tokens ----------------------------------------------------------------------------------


class MaskedRows:
    """Stands for the training data. Of row g's targets, the last 2 * g are to be ignored: all of rows 8 and up."""

    def __init__(self, config: Config) -> None:
        size, length = config.train.global_batch_size or 0, config.data.seq_len
        self.table = skewed_tokens(size * (length + 1), config.model.vocab_size).reshape(size, length + 1)
        for g, row in enumerate(self.table):
            row[max(1, length + 1 - 2 * g) :] = -100

    samples_per_epoch = None

    def rows(self, first: int, count: int) -> np.ndarray:
        return self.table[first : first + count]


def test_every_token_counts_the_same() -> None:
    """The loss is the mean over the tokens of the global batch, not the mean of micro-batches' or ranks' means."""
    run_ranks(4, check_token_mean)


def check_token_mean(rank: int) -> None:
    from tptrain.trainer import Trainer

    alone = mesh_of(dp=4).tp  # of one rank
    for layout in ({"dp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"pp": 4}):
        config = small_config(
            train__global_batch_size=16, optimizer__name="sgd", optimizer__lr=0.1, optimizer__weight_decay=0.0, optimizer__grad_clip=None,
            **{f"parallel__{axis}": size for axis, size in layout.items()},
        )  # fmt: skip
        tokens = skewed_tokens(1000, config.model.vocab_size)
        data = MaskedRows(config)
        trainer = Trainer(config, mesh_of(**layout), replace(Data.of_tokens(config, tokens), train=data))
        result = trainer.step()

        table = torch.from_numpy(data.rows(0, 16))
        twin = GPTStage(config.model, 0, config.model.num_layers, alone, CPU)
        initialise(twin, config.model, config.seed)
        counted = (table[:, 1:] != -100).sum()
        loss = twin(table[:, :-1].clamp(min=0), table[:, 1:]) / counted
        loss.backward()
        norm = torch.stack([parameter.grad.full_tensor().norm() for parameter in twin.parameters()]).norm()
        assert 0 < counted < table[:, 1:].numel() / 2
        assert result.loss == pytest.approx(loss.item(), rel=1e-5), layout
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4), layout
        learning_rate = result.lr
        for name, parameter in trainer.share.named_parameters():
            theirs = twin.get_parameter(name)
            expected = whole(theirs) - learning_rate * whole(theirs.grad)
            assert_close(whole(parameter), expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name, where=layout: f"{where} {n}: {text}")
