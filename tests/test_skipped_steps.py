"""Steps that are not taken: a gradient that is no number on one rank, and a loss that is a spike; and that a run repeats itself."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.support import small_config
from tests.test_trainer import trainer_of
from tptrain.config import Config, ConfigError
from tptrain.mesh import Mesh, build_mesh
from tptrain.optim.guard import StepGuard
from tptrain.step_watch import StepWatch
from tptrain.stop import Wish
from tptrain.tensor_parallel.parameter import local_part
from tptrain.trainer import StepResult, Trainer

POISON, STEPS = {2: math.nan, 4: math.inf}, 6
"""What one gradient of one rank becomes in the step after so many."""
LAYOUTS: list[dict[str, int]] = [{}, {"tp": 2, "pp": 2}, {"dp": 2}]
OPTIMIZERS: list[dict[str, Any]] = [{}, {"optimizer__name": "sgd", "optimizer__momentum": 0.9}]


def tensors_of(trainer: Trainer) -> list[np.ndarray]:
    """This rank's weights and all of its optimizer's state."""
    parameters = [local_part(parameter.detach()) for _, parameter in trainer.share.named_parameters()]
    state = [local_part(value) for values in trainer.optimizer.state.values() for value in values.values()]
    return [tensor.numpy().copy() for tensor in (*parameters, *state)]


def equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def train(rank: int, config: Config, poisoned: bool) -> dict[str, Any]:
    """Steps of which those in POISON are struck in a rank in the middle, or else passed over altogether."""
    trainer = trainer_of(config)
    real, struck = trainer.share.sum_gradients, trainer.mesh.world.size() // 2  # with tp 0, whose copy of what is replicated counts

    def poison() -> None:
        real()
        if trainer.steps_done in POISON and rank == struck:
            gradient = next(iter(trainer.share.counted_gradients()))
            local_part(gradient).view(-1)[-1:] = POISON[trainer.steps_done]

    trainer.share.sum_gradients = poison  # type: ignore[method-assign]
    losses, facts, kept = [], [], []
    while trainer.steps_done < STEPS:
        is_bad = trainer.steps_done in POISON
        if is_bad and not poisoned:
            trainer.steps_done += 1
            trainer.samples_done += config.batch_size
            continue
        before = tensors_of(trainer)
        result = trainer.step()
        facts.append(result.facts())
        kept.append(equal(before, tensors_of(trainer)))
        if not is_bad:
            losses.append(result.loss)
    return {"losses": losses, "facts": facts, "kept": kept, "tensors": tensors_of(trainer)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_gradient_that_is_no_number_on_one_rank_is_taken_by_none(layout: dict) -> None:
    """Weights and moments stay as they are to the bit, and what follows is what follows where that batch is passed over."""
    configs = [small_config(**optimizer, **{f"parallel__{axis}": size for axis, size in layout.items()}) for optimizer in OPTIMIZERS]
    run_ranks(configs[0].processes, check_poison, configs)


def check_poison(rank: int, configs: list[Config]) -> None:
    for config in configs:
        struck, passed_over = (train(rank, config, poisoned) for poisoned in (True, False))
        assert struck["facts"] == [(False, step in POISON, False) for step in range(STEPS)]
        assert struck["kept"] == [step in POISON for step in range(STEPS)]
        assert struck["losses"] == passed_over["losses"]
        assert equal(struck["tensors"], passed_over["tensors"])


def test_spikes_by_hand() -> None:
    """The mean of the loss weighs each step by 0.98 to the power of its age; a spike that is skipped does not enter it."""
    losses = [*np.linspace(5, 3, 30), 9.0, 3.0, 6.5, 2.9]
    for skips in (False, True):
        guard, expected, found, seen = StepGuard(2.0, skips, torch.device("cpu")), [], [], []
        for number, loss in enumerate(losses):
            weights = 0.98 ** np.arange(len(seen))[::-1]
            spike = number >= 20 and loss > 2 * np.average(seen, weights=weights)
            expected.append([float(spike and skips), float(spike)])
            if not (spike and skips):
                seen.append(loss)
            tokens = torch.tensor(7.0, dtype=torch.float64)
            found.append(
                guard.judge(torch.tensor(1.0, dtype=torch.float64), 7.0 * torch.tensor(loss, dtype=torch.float64), tokens).tolist()
            )
            again = StepGuard(2.0, skips, torch.device("cpu"))
            again.load_state(guard.state())
            guard = again
        assert found == expected
        assert found[30] == [float(skips), 1.0]


def test_how_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """Of eight steps; the last must be good. A run that is asked to stop does so after a good step."""
    run_ranks(1, check_rows, tmp_path)


def check_rows(rank: int, folder: Path) -> None:
    (folder / "checkpoints/step-00000001").mkdir(parents=True)
    config = small_config(train__max_steps=8)
    mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
    for most, bad, ends_at in [(0, {4}, 4), (2, {2, 3, 5, 6}, None), (2, {2, 3, 4}, 4), (9, {8}, 8)]:
        config.train.max_skipped_steps = most
        watch, warnings = watch_of(config, mesh, folder)
        for step in range(1, (ends_at or 9)):
            watch.look(step, result_of(step in bad), now=False)
            assert watch.in_doubt == (step in bad)
        if ends_at is not None:
            with pytest.raises(FloatingPointError, match=r"the last good checkpoint is .*step-00000001"):
                watch.look(ends_at, result_of(skipped=True), now=False)
        else:
            assert watch.skipped == len(bad) == len(warnings)
            assert "step 6" in warnings[-1]
            assert "(2 in a row, 4 of all)" in warnings[-1]
    watch, _ = watch_of(config, mesh, folder)
    stops = []
    for step in range(1, 6):
        watch.look(step, result_of(skipped=step in (2, 3), asked=step >= 2), now=False)
        stops.append(watch.stop)
    assert stops == [False, False, False, True, True]


def watch_of(config: Config, mesh: Mesh, folder: Path) -> tuple[StepWatch, list[str]]:
    """A watch over a run that has taken no step, and what it will warn of."""
    warnings: list[str] = []
    trainer: Any = SimpleNamespace(config=config, mesh=mesh, skipped_steps=0, steps_done=0)
    saver: Any = SimpleNamespace(home=folder / "checkpoints", wait=lambda: None)
    return StepWatch(trainer, SimpleNamespace(warn=warnings.append), saver, Wish()), warnings  # type: ignore[arg-type]


def result_of(skipped: bool, asked: bool = False) -> StepResult:
    """A step as its watch sees it."""
    totals, verdict = ([0.0, 0.0, 0.0, float(asked)], [float(skipped), 0.0])
    result = StepResult(torch.tensor(totals, dtype=torch.float64), 0.1, torch.tensor(verdict, dtype=torch.float64))
    result.begin_copy()
    return result


def test_the_same_layout_twice_gives_the_same_bits() -> None:
    config = small_config(model__dropout=0.1, parallel__dp=2, parallel__tp=2)
    for one, other in zip(*(run_ranks(config.processes, train, config, True) for _ in range(2)), strict=True):
        assert one["losses"] == other["losses"]
        assert equal(one["tensors"], other["tensors"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__spike_factor": 1.0}, "train.spike_factor=1.0 is not above 1"),
        ({"train__skip_spikes": True}, "train.skip_spikes=true has no spikes to skip"),
        ({"train__max_minutes": 0.0}, "train.max_minutes=0.0 is not above 0: use a positive number, or null"),
        ({"train__max_restarts": -1}, "train.max_restarts=-1 is below 0"),
        ({"train__max_skipped_steps": -1}, "train.max_skipped_steps=-1 is below 0"),
        ({"launch__stop_seconds": 0.0}, "launch.stop_seconds=0.0 is not above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)
