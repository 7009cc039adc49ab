"""A run that saves every second step in the background, and is killed again and again: each start goes on, and no loss differs.

KILLS=100 in the environment makes as many kills; else there are fewer, as each takes a start.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command import wait_until
from tests.ranks import run_ranks, started_ranks
from tests.support import small_config
from tptrain.checkpoint.folder import complete_checkpoints, read_state
from tptrain.checkpoint.manifest import DamagedCheckpoint, check_manifest
from tptrain.config import Config
from tptrain.data import prepare
from tptrain.monitor.metrics import read_metrics

KILLS = int(os.environ.get("KILLS", "40"))
FIRST_LIFE_STEPS = 20
SPAN_STEPS = 8
"""Kills fall within the time of so many steps after a life's first one."""


def config_of(stores: Path, max_steps: int, **changes: Any) -> Config:
    config = small_config(
        parallel__tp=2, parallel__micro_batches=1, train__global_batch_size=2, model__num_layers=1, train__max_steps=max_steps,
        train__eval_steps=0, lr_schedule__name="constant", data__vocab_size=64, data__num_sequences=64, data__store_dir=str(stores),
        **changes,
    )  # fmt: skip
    config.train.trace_steps = []
    return config


def live(rank: int, config: Config, run_dir: Path, store_dir: Path) -> None:
    """Train until the end, or until it comes."""
    from tptrain.train import train

    train(config, run_dir, store_dir)


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as far as they are written; no step twice."""
    records = [record for record in read_metrics(run_dir) if "loss" in record]
    found = {int(record["step"]): (record["loss"], record["grad_norm"]) for record in records}  # type: ignore[arg-type, misc]
    assert list(found) == list(range(1, len(records) + 1))
    return found  # type: ignore[return-value]


def steps_of(run_dir: Path) -> int:
    return (run_dir / "metrics.jsonl").read_bytes().count(b"\n") if (run_dir / "metrics.jsonl").exists() else 0


def check_folder(home: Path) -> bool:
    """What bears a complete one's name is whole, and what does not is not or wants its name only. Returns whether one was being written."""
    for folder in complete_checkpoints(home):
        check_manifest(folder)
        assert f"step-{read_state(folder)['step']:08d}" == folder.name
    partial = list(home.glob("*.partial"))
    for folder in partial:
        try:
            check_manifest(folder)
        except DamagedCheckpoint:
            continue
        assert (folder / "state.json").is_file(), "the manifest is the last"
    return bool(partial)


@pytest.mark.timeout(3000)
def test_killed_at_any_moment_a_run_loses_nothing(tmp_path: Path) -> None:
    chance, seen = random.Random(6), {}
    run_dir, home = tmp_path / "run", tmp_path / "run/checkpoints"
    config = config_of(tmp_path / "stores", 10**6, checkpoint__every=2, checkpoint__async_save=True)
    store_dir = prepare(config, print)
    step_seconds, in_a_save, began_at = 0.0, 0, []
    for kill in range(KILLS + 1):
        before = steps_of(run_dir)
        with started_ranks(2, live, config, run_dir, store_dir) as (processes, receivers):

            def at_work(steps: int) -> bool:
                for receiver in receivers:
                    assert not receiver.poll(), receiver.recv()[0]
                return steps_of(run_dir) != before if steps == 1 else steps_of(run_dir) >= steps

            if kill == 0:
                wait_until(lambda: at_work(1), 120)
                start, done = time.monotonic(), steps_of(run_dir)
                wait_until(lambda: at_work(FIRST_LIFE_STEPS), 300)
                step_seconds = (time.monotonic() - start) / (steps_of(run_dir) - done)
            elif chance.random() < 0.1:
                time.sleep(chance.uniform(0, 20 * step_seconds))
            else:
                wait_until(lambda: at_work(1), 120)
                time.sleep(chance.uniform(0, SPAN_STEPS * step_seconds))
            at_work(0)
            victims = processes if chance.random() < 0.5 else [chance.choice(processes)]
            for process in victims:
                process.kill()
            for process in processes:
                process.join(60)
                assert not process.is_alive(), "who loses another rank ends"
        in_a_save += check_folder(home)
        began_at.append(read_state(complete_checkpoints(home)[-1])["step"])
        for step, values in losses(run_dir).items():
            assert seen.setdefault(step, values) == values, f"step {step} after kill {kill}"
    assert in_a_save > KILLS / 5, "kills must fall into saves"
    assert len(set(began_at)) > KILLS / 5, "and the run must come on"
    assert began_at == sorted(began_at)
    reference = tmp_path / "reference"
    run_ranks(2, live, config_of(tmp_path / "stores", len(seen)), reference, store_dir)
    assert losses(reference) == seen
