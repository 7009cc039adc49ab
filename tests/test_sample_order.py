"""No sample is lost or repeated over two epochs, whatever stops a run and whatever layout goes on with it; and the losses are the same.

Windows of random tokens are all different, so what a rank computes on tells which sample it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.saving import save_now, start_from
from tests.support import small_config
from tptrain.config import Config
from tptrain.data import Data, Mixture, Sampler, StoreError
from tptrain.data.dataset import VAL_LOSS
from tptrain.mesh import build_mesh
from tptrain.trainer import Trainer

WINDOWS = 44
"""In an epoch: five and a half steps of eight, so that an epoch ends within a batch."""
STEPS = 2 * WINDOWS // 8
UNBROKEN = [(STEPS, {})]
STOPS: list[tuple[int, dict[str, int]]] = [
    (3, {"dp": 4, "micro_batch_size": 2}),
    (5, {"dp": 2, "tp": 2, "micro_batch_size": 4}),
    (6, {"dp": 4, "micro_batch_size": 1}),
    (8, {"tp": 2, "pp": 2, "micro_batch_size": 1}),
    (10, {"dp": 2, "pp": 2, "micro_batch_size": 2}),
    (11, {"pp": 4, "micro_batch_size": 8}),
]
"""Until which step a run goes, and in which layout."""
TOKENS = np.random.default_rng(3).integers(0, 257, WINDOWS * 16 + 1)
KINDS = ("one source", "mixture")


def data_of(config: Config, kind: str) -> Data:
    data = Data.of_tokens(config, TOKENS[: WINDOWS * 16 + 1], TOKENS[: 13 * 16 + 1])
    if kind == "one source":
        return data
    cut = 30 * 16  # 30 windows and 14
    parts = {"a": Sampler(TOKENS[: cut + 1], 16, "7/a"), "b": Sampler(TOKENS[cut:], 16, "7/b")}
    sets = {"val_loss/a": Sampler(TOKENS[: 13 * 16 + 1], 16, 0), "val_loss/b": Sampler(TOKENS[-100:], 16, 0)}
    return replace(
        data, train=Mixture(parts, {"a": 30, "b": 14}), validation=sets, weights={"val_loss/a": 0.25, "val_loss/b": 0.75},
        train_tokens={"a": cut + 1, "b": WINDOWS * 16 + 1 - cut},
    )  # fmt: skip


def train(rank: int, folder: Path, stops: list[tuple[int, dict[str, int]]]) -> dict[str, Any]:
    """What this rank's first stage computes on, by step, and the losses, for each kind of data."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        seen: dict[int, list[tuple[int, ...]]] = {}
        losses, evaluations = [], []
        for last, layout in stops:
            config = small_config(
                **{f"parallel__{key}": value for key, value in layout.items()},
                data__seq_len=16, train__max_steps=STEPS, train__global_batch_size=8, train__eval_steps=None, parallel__micro_batches=None,
            )  # fmt: skip
            trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), data_of(config, kind))
            start_from(trainer, folder / kind)
            note_inputs(trainer, seen)
            trainer.read_ahead()
            while trainer.steps_done < last:
                losses.append(trainer.step().loss)
                evaluations.append(trainer.evaluate())
            save_now(trainer, folder / kind)
            trainer.close()
        found[kind] = {"seen": seen, "losses": losses, "evaluations": evaluations}
    return found


def note_inputs(trainer: Trainer, seen: dict[int, list[tuple[int, ...]]]) -> None:
    """Let a trainer note the rows that it trains on, where its rank is the one of its dp rank that shows them first."""
    compute = trainer.engine.train

    def noting(actions: Any, inputs: Any, targets: Any, *more: Any) -> Any:
        if trainer.share.is_first and trainer.mesh.tp_rank == 0:
            rows = [(*row, following[-1]) for x, y in zip(inputs, targets, strict=True)
                    for row, following in zip(x.tolist(), y.tolist(), strict=True)]  # fmt: skip
            seen.setdefault(trainer.steps_done, []).extend(rows)
        return compute(actions, inputs, targets, *more)

    trainer.engine.train = noting  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every rank's findings of the unbroken run in one process and of the broken one in four."""
    one, four = (tmp_path_factory.mktemp(name) for name in ("one", "four"))
    return {"unbroken": run_ranks(1, train, one, UNBROKEN), "broken": run_ranks(4, train, four, STOPS)}


def samples(ranks: list[dict[str, Any]], kind: str) -> list[Counter[int]]:
    """For each step how often each window was computed on, over all ranks."""
    number = {tuple(TOKENS[w * 16 : w * 16 + 17].tolist()): w for w in range(WINDOWS)}
    assert len(number) == WINDOWS
    steps = [[row for rank in ranks for row in rank[kind]["seen"].get(step, [])] for step in range(STEPS)]
    return [Counter(number[row] for row in rows) for rows in steps]


def test_two_epochs_show_each_sample_twice(runs: dict[str, list[dict[str, Any]]]) -> None:
    for run, ranks in runs.items():
        steps = samples(ranks, "one source")
        assert [step.total() for step in steps] == [8] * STEPS, run
        assert sum(steps, Counter()) == Counter(dict.fromkeys(range(WINDOWS), 2)), run
        assert max(sum(steps[:5], Counter()).values()) == 1, "the second time not before all came once"


def test_a_mixture_s_sources_end_their_epochs_each_for_itself(runs: dict[str, list[dict[str, Any]]]) -> None:
    """88 samples in shares of 30 and 14 to 44 are two epochs of each, to within a sample of the mixture."""
    for run, ranks in runs.items():
        counts = sum(samples(ranks, "mixture"), Counter())
        assert counts.total() == 88
        for windows in (range(30), range(30, WINDOWS)):
            total = sum(counts[window] for window in windows)
            assert abs(total - 2 * len(windows)) <= 1, run
            assert sum(abs(counts[window] - 2) for window in windows) <= 1, run


@pytest.mark.parametrize("kind", KINDS)
def test_stops_and_layouts_change_nothing(runs: dict[str, list[dict[str, Any]]], kind: str) -> None:
    assert samples(runs["broken"], kind) == samples(runs["unbroken"], kind), "the same samples in each step"
    expected = runs["unbroken"][0][kind]
    for rank in runs["broken"]:
        assert rank[kind]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for found, wanted in zip(rank[kind]["evaluations"], expected["evaluations"], strict=True):
            assert list(found) == list(wanted)
            assert found == pytest.approx(wanted, rel=1e-5)
    if kind == "mixture":
        last = expected["evaluations"][-1]
        assert last[VAL_LOSS] == pytest.approx(0.25 * last["val_loss/a"] + 0.75 * last["val_loss/b"])
        assert last["val_loss/a"] != last["val_loss/b"]


def test_an_evaluation_is_over_the_whole_set(tmp_path: Path) -> None:
    """13 windows in batches of 8: the mean over all tokens, by another way through the data."""
    run_ranks(1, check_whole_set)


def check_whole_set(rank: int) -> None:
    config = small_config(data__seq_len=16, train__eval_steps=None)
    trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), data_of(config, "one source"))
    windows = torch.tensor(np.stack([TOKENS[w * 16 : w * 16 + 17] for w in range(13)]))
    trainer.share.begin(training=False)
    with torch.no_grad():
        logits = trainer.share.stages[0](windows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    trainer.share.release()
    assert trainer.evaluate() == {VAL_LOSS: pytest.approx(expected.item(), rel=1e-5)}


def test_a_run_does_not_go_on_with_other_text(tmp_path: Path) -> None:
    run_ranks(1, check_other_text, tmp_path)


def check_other_text(rank: int, folder: Path) -> None:
    config = small_config(data__seq_len=16)
    mesh = build_mesh(config.parallel, torch.device("cpu"), 60)
    trainer = Trainer(config, mesh, data_of(config, "one source"))
    trainer.step()
    save_now(trainer, folder)
    other = Trainer(config, mesh, Data.of_tokens(config, TOKENS[:500]))
    with pytest.raises(ValueError, match="training tokens memorize 500, but it was made with memorize 705: use the same text"):
        start_from(other, folder)
    assert other.steps_done == 0


def test_an_error_of_the_reader_ends_the_step_that_needs_it(tmp_path: Path) -> None:
    run_ranks(1, check_reader_error)


class Damaged:
    """A source of which the rows from sample 16 on cannot be read."""

    samples_per_epoch = None

    def rows(self, first: int, count: int) -> np.ndarray:
        if first >= 16:
            raise StoreError("train-00003.tokens is damaged")
        return np.zeros((count, 17), dtype=np.int64)


def check_reader_error(rank: int) -> None:
    config = small_config(data__seq_len=16)
    data = replace(data_of(config, "one source"), train=Damaged())
    trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), data)
    trainer.step()
    trainer.step()
    with pytest.raises(StoreError, match=r"train-00003\.tokens is damaged"):
        trainer.step()
