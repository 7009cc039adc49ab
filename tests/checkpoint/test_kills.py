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
from tptrain.checkpoint.folder import complete_checkpoints, read_state, step_of
from tptrain.checkpoint.manifest import check_manifest
from tptrain.config import Config
from tptrain.data import prepare
from tptrain.monitor.metrics import read_metrics

KILLS = int(os.environ.get("KILLS", "30"))
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


class Run:
    """A run of two ranks that is killed again and again."""

    def __init__(self, config: Config, run_dir: Path, store_dir: Path) -> None:
        self.arguments, self.run_dir, self.home = (config, run_dir, store_dir), run_dir, run_dir / "checkpoints"
        self.chance = random.Random(6)
        self.step_seconds = 0.0
        self.seen: dict[int, tuple[float, float]] = {}
        """Loss and gradient norm of every step that any life logged."""

    def live_and_die(self, first: bool) -> None:
        """Start the ranks, and kill all of them or one at some moment. The first time that comes late, and a step's time is measured."""
        before = steps_of(self.run_dir)
        with started_ranks(2, live, *self.arguments) as (processes, receivers):

            def steps_done() -> int:
                for receiver in receivers:
                    assert not receiver.poll(), receiver.recv()[0]
                return steps_of(self.run_dir)

            victims = processes if self.chance.random() < 0.5 else [self.chance.choice(processes)]
            if first:
                wait_until(lambda: steps_done() > 0, 120)
                began = time.monotonic()
                wait_until(lambda: steps_done() > FIRST_LIFE_STEPS, 300)
                self.step_seconds = (time.monotonic() - began) / FIRST_LIFE_STEPS
            elif self.chance.random() < 0.9:
                wait_until(lambda: steps_done() != before, 120)
                time.sleep(self.chance.uniform(0, SPAN_STEPS * self.step_seconds))
            else:  # perhaps before the ranks know each other, when a lone one waits for the other as long as it may
                time.sleep(self.chance.uniform(0, 20 * self.step_seconds))
                victims = processes
            steps_done()
            for process in victims:
                process.kill()
            for process in processes:
                process.join(100)
                assert not process.is_alive(), "who loses another rank ends"

    def check(self) -> bool:
        """The folder is in order, and no step was ever logged with two losses. Returns whether a checkpoint was being written."""
        for folder in complete_checkpoints(self.home):
            check_manifest(folder)
            assert f"step-{read_state(folder)['step']:08d}" == folder.name
        for step, values in losses(self.run_dir).items():
            assert self.seen.setdefault(step, values) == values, step
        return any(self.home.glob("*.partial"))

    def newest(self) -> int:
        """The step that the next life begins from."""
        return step_of(complete_checkpoints(self.home)[-1])


@pytest.mark.timeout(3000)
def test_killed_at_any_moment_a_run_loses_nothing(tmp_path: Path) -> None:
    """Each life must find a checkpoint that its ranks can read, and repeats what others logged after it, to the bit."""
    config = config_of(tmp_path / "stores", 10**6, checkpoint__every=2, checkpoint__async_save=True)
    run = Run(config, tmp_path / "run", prepare(config, print))
    in_a_save, begins = 0, []
    for kill in range(KILLS + 1):
        run.live_and_die(first=kill == 0)
        in_a_save += run.check()
        begins.append(run.newest())
    assert begins == sorted(begins), "what was complete stays"
    assert in_a_save >= KILLS / 8, "kills must fall into saves"
    assert len(set(begins)) >= KILLS / 8, "and the run must come on"
    reference = tmp_path / "reference"
    run_ranks(2, live, config_of(tmp_path / "stores", len(run.seen)), reference, run.arguments[2])
    assert losses(reference) == run.seen
    print(f"{KILLS} kills, {in_a_save} while a checkpoint was written; {len(run.seen)} steps, resumed from {len(set(begins))} checkpoints")
