"""Saving in the background: what is written is the state of the moment of the call; what fails is said, on all ranks alike."""

from __future__ import annotations

import logging
import resource
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ranks import run_ranks
from tests.saving import saver_of
from tests.support import skewed_tokens, small_config
from tptrain.checkpoint.folder import complete_checkpoints
from tptrain.config import ConfigError

WRITE = "tptrain.checkpoint.saver.write_tensors"


def lines_of(level: int) -> list[str]:
    """What the logger "tptrain" says from now on, at this level and above."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tptrain").addHandler(handler)
    logging.getLogger("tptrain").setLevel(logging.INFO)
    return lines


def trainer_of(**changes: Any) -> Any:
    """A small trainer."""
    from tptrain.data.dataset import Data
    from tptrain.mesh import build_mesh
    from tptrain.trainer import Trainer

    config = small_config(model__num_layers=2, **{"checkpoint__async_save": True, **changes})
    return Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, skewed_tokens(2000, 257)))


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """All tensors of a trainer, whole, as they are now."""
    from tptrain.checkpoint.sharded import training_tensors

    tensors = training_tensors(trainer.share.owned_parameters(), trainer.optimizer)
    return {key: getattr(value, "full_tensor", lambda value=value: value)().clone() for key, value in tensors.items()}


# ---- what is written ---------------------------------------------------------------------------------------


def train_on_while_it_writes(rank: int, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Save, change every weight while nothing is written yet, then let it write; twice, into the same memory."""
    from tptrain.checkpoint import saver as module
    from tptrain.checkpoint.sharded import read_tensors
    from tptrain.train import save_checkpoint

    trainer, real, given = trainer_of(**changes), module.write_tensors, []
    saver, lines, seen = saver_of(trainer, folder), lines_of(logging.INFO), {}
    for save in range(2):
        released = threading.Event()

        def late(folder: Path, tensors: Any, group: Any, released: threading.Event = released) -> None:
            assert released.wait(100)
            given.append((set(tensors), sum(saver_part(tensor) for tensor in tensors.values())))
            real(folder, tensors, group)

        with mock.patch(WRITE, late):
            trainer.step()
            saver.prepare(trainer.share.owned_parameters(), trainer.optimizer)
            then = whole_state(trainer)
            save_checkpoint(trainer, saver)
            memory = saver._staging.bytes
            trainer.step()
            early, told = complete_checkpoints(saver.home), saver.take_complete()
            released.set()
            saver.finish()
        found = {key: torch.zeros_like(value) for key, value in then.items()}
        read_tensors(saver.home / f"step-{2 * save + 1:08d}", found, saver.group)
        moved = [key for key, value in whole_state(trainer).items() if not torch.equal(value, then[key])]
        equal = all(torch.equal(found[key], value) for key, value in then.items())
        seen[save] = {"early": len(early), "told": told, "then": saver.take_complete(), "equal": equal, "moved": len(moved) / len(then)}
    return {**seen, "keys": set(then), "given": given, "memory": memory, "all": sum(v.nbytes for v in then.values()), "lines": lines}


def saver_part(tensor: Any) -> int:
    """Bytes of this rank's part."""
    return getattr(tensor, "to_local", lambda: tensor)().nbytes


@pytest.mark.parametrize("layout", [{"parallel__tp": 2}, {"parallel__dp": 2}], ids=["tp2", "dp2"])
def test_the_state_of_the_call_is_written_whatever_training_does_meanwhile(layout: dict[str, int], tmp_path: Path) -> None:
    ranks = run_ranks(2, train_on_while_it_writes, tmp_path, layout)
    for seen in ranks:
        for save in (0, 1):
            assert seen[save]["early"] == save, "nothing is complete before it is written"
            assert (seen[save]["told"], seen[save]["then"]) == (None, 2 * save + 1), "and it is told once"
            assert seen[save]["equal"]
            assert seen[save]["moved"] == 1
    first, second = ([keys for keys, _ in seen["given"]] for seen in ranks)
    assert first[0] | second[0] == ranks[0]["keys"]
    amounts = [amount for seen in ranks for _, amount in seen["given"][:1]]
    assert sum(amounts) == ranks[0]["all"], "each number is copied and written by one rank"
    assert max(amounts) < 1.2 * min(amounts)
    for seen, amount in zip(ranks, amounts, strict=True):
        padding = seen["memory"] - amount
        assert 0 <= padding < 64 * len(seen["keys"]), "no more memory than for what this rank writes"
    told = ranks[0]["lines"]
    assert [line.split("; the loop was held")[0] for line in told if line.startswith("step 1")] == [
        f"step 1: saves {ranks[0]['memory']:,} bytes of this rank in the background"
    ]
    complete = f"{tmp_path}/checkpoints/step-00000001 is complete: {ranks[0]['all']:,} bytes of tensors in "
    assert any(line.startswith(complete) for line in told)


def test_an_optimizer_that_makes_its_state_late(tmp_path: Path) -> None:
    """SGD has no momentum before a step is taken; who writes what is agreed anew."""
    run_ranks(2, check_late_state, tmp_path)


def check_late_state(rank: int, folder: Path) -> None:
    from tptrain.train import save_checkpoint

    trainer = trainer_of(parallel__tp=2, optimizer__name="sgd", optimizer__momentum=0.9)
    saver = saver_of(trainer, folder)
    saver.prepare(trainer.share.owned_parameters(), trainer.optimizer)
    saver.wait()
    before = saver._division.total_bytes
    trainer.step()
    save_checkpoint(trainer, saver)
    saver.finish()
    assert saver._division.total_bytes == 2 * before


# ---- what fails --------------------------------------------------------------------------------------------


def fail_then_work(rank: int, folder: Path, async_save: bool) -> dict[str, Any]:
    """Five saves: a good one; one in which rank 1 may write 4 kB only; one without room on the disk; a good one; and a bad last one."""
    from tptrain.checkpoint import saver as module
    from tptrain.train import save_checkpoint

    lines = lines_of(logging.WARNING)
    trainer = trainer_of(parallel__tp=2, checkpoint__async_save=async_save)
    saver = saver_of(trainer, folder)

    def save() -> list[str]:
        trainer.step()
        save_checkpoint(trainer, saver)
        saver.wait()
        return sorted(path.name for path in saver.home.iterdir())

    seen: dict[str, Any] = {"good": save()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    seen["too large"], seen["too large error"] = save(), saver.last.error
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with mock.patch.object(module, "_SPARE_BYTES", 1 << 60):
        seen["full"], seen["full error"] = save(), saver.last.error
    seen["good again"], seen["good error"] = save(), saver.last.error
    saver.finish()
    with mock.patch.object(module, "_SPARE_BYTES", 1 << 60):
        save()
    try:
        saver.finish()
    except module.SaveError as error:
        seen["end"] = str(error)
    seen["lines"] = lines
    return seen


@pytest.mark.parametrize("async_save", [True, False])
def test_a_failed_write_leaves_the_old_ones_and_the_next_save_works(async_save: bool, tmp_path: Path) -> None:
    first, second = run_ranks(2, fail_then_work, tmp_path, async_save)
    for seen in (first, second):
        assert seen["good"] == seen["too large"] == seen["full"] == ["latest", "step-00000001"], "and no half one takes room"
        assert seen["too large error"].startswith("[Errno 27] File too large: '")
        assert "rank-00001" in seen["too large error"]
        assert "are free on the disk of" in seen["full error"]
        assert seen["good again"] == ["latest", "step-00000001", "step-00000004"]
        assert seen["good error"] is None
        assert seen["end"].startswith("the last checkpoint, of step 5, was not written: ")
    assert second["lines"] == [], "rank 0 speaks"
    assert len(first["lines"]) == 3
    assert first["lines"][0].startswith("step-00000002 was not written: [Errno 27] File too large")
    assert first["lines"][0].endswith("the run goes on and tries again at the next one, the newest is step-00000001")


def fill_the_disk(rank: int, folder: Path, disk: Path) -> dict[str, Any]:
    """Train for eight steps with a save at every second one; somebody fills the disk for a while, or to the end."""
    from tptrain.checkpoint import saver as module
    from tptrain.data import prepare
    from tptrain.train import train
    from tptrain.trainer import Trainer

    lines, seen = lines_of(logging.WARNING), {}
    real_step, real_write = Trainer.step, module.write_tensors
    for name, full in (("a while", {4}), ("the end", {6, 8})):
        config = small_config(
            train__max_steps=8, checkpoint__every=2, checkpoint__async_save=True, checkpoint__dir=str(disk / name), checkpoint__keep=1,
            data__vocab_size=64, data__num_sequences=64, data__store_dir=str(folder / "stores"),
        )  # fmt: skip
        config.train.trace_steps = []

        def write(partial: Path, *arguments: Any, full: set[int] = full) -> None:
            ballast = disk / "ballast"
            if int(partial.name[5:13]) in full:
                with pytest.raises(OSError, match="No space"):
                    ballast.write_bytes(bytes(4 << 20))
            try:
                real_write(partial, *arguments)
            finally:
                ballast.unlink(missing_ok=True)

        with mock.patch(WRITE, write), mock.patch.object(module, "_SPARE_BYTES", -(1 << 60)):
            try:
                train(config, folder / name, prepare(config, lambda *_: None))
            except module.SaveError as error:
                seen[name] = str(error)
        seen[f"{name} left"] = sorted(path.name for path in (disk / name).iterdir())
    assert Trainer.step is real_step
    return {**seen, "lines": lines}


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    (seen,) = run_ranks(1, fill_the_disk, tmp_path, small_disk)
    assert "a while" not in seen
    assert seen["a while left"] == ["latest", "step-00000008"]
    assert seen["the end"].startswith("the last checkpoint, of step 8, was not written: [Errno 28] No space left on device: ")
    assert seen["the end left"] == ["latest", "step-00000004"]
    told = [line.split(" was not written: [Errno 28] No space left on device")[0] for line in seen["lines"] if "No space" in line]
    assert told == ["step-00000004", "step-00000006", "step-00000008"]


# ---- where ------------------------------------------------------------------------------------------------


def test_a_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.dir=s3://bucket/run is a URL, .*: use a folder, such as one where that storage is"):
        small_config(checkpoint__dir="s3://bucket/run")
