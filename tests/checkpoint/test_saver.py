"""Saving in the background: what is written is the state of the moment of the call; what fails is said, on all ranks alike."""

from __future__ import annotations

import logging
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tptrain.checkpoint.chunks import Chunk, index_of, writers
from tptrain.checkpoint.folder import complete_checkpoints


def lines_of(level: int) -> list[str]:
    """What the logger "tptrain" says from now on, at this level and above."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tptrain").addHandler(handler)
    logging.getLogger("tptrain").setLevel(logging.INFO)
    return lines


def saving(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A trainer, and a saver into `folder`."""
    from tptrain.checkpoint.saver import Saver
    from tptrain.data.dataset import Data
    from tptrain.mesh import background_group, build_mesh
    from tptrain.trainer import Trainer

    config = small_config(model__num_layers=2, checkpoint__async_save=True, **changes)
    trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, skewed_tokens(2000, 257)))
    return trainer, Saver(folder, config.checkpoint, background_group(60))


def hold_writing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let every write wait for the event."""
    from tptrain.checkpoint import saver as module

    real, released = module.write_file, threading.Event()

    def late(*arguments: Any) -> Any:
        assert released.wait(60)
        return real(*arguments)

    monkeypatch.setattr(module, "write_file", late)
    return released


def train_on_while_it_writes(rank: int, folder: Path) -> dict[str, Any]:
    """Save, change every weight while nothing is written yet, then let it write."""
    from tptrain.checkpoint.reader import StoredTensors
    from tptrain.checkpoint.sharded import training_tensors
    from tptrain.train import save_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        released = hold_writing(patch)
        trainer, saver = saving(folder, parallel__tp=2)
        trainer.step()
        tensors = training_tensors(trainer.share.parameters(), trainer.optimizer)
        whole = {key: getattr(value, "full_tensor", lambda value=value: value)().clone() for key, value in tensors.items()}
        save_checkpoint(trainer, saver)
        for _ in range(2):
            trainer.step()
        early = complete_checkpoints(folder)
        released.set()
        saver.finish()
    stored = StoredTensors(folder / "checkpoints/step-00000001")
    equal = [torch.equal(stored.whole(key), value) for key, value in whole.items()]
    moved = not torch.equal(stored.whole("model.final_norm.weight"), trainer.share.parameters()["final_norm.weight"].full_tensor())
    return {"early": early, "equal": equal, "moved": moved, "kept": len(stored.shapes), "left": len(complete_checkpoints(folder))}


def test_the_state_of_the_call_is_written_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    for seen in run_ranks(2, train_on_while_it_writes, tmp_path):
        assert seen["early"] == [], "nothing is complete before it is written"
        assert len(seen["equal"]) == seen["kept"] > 10
        assert all(seen["equal"])
        assert seen["moved"]
        assert seen["left"] == 1


def fail_then_work(rank: int, folder: Path) -> dict[str, Any]:
    """Five saves: a good one; one in which rank 1 may write 4 kB only; one without room on the disk; a good one; and a bad last one."""
    from tptrain.checkpoint import saver as module
    from tptrain.train import save_checkpoint

    lines = lines_of(logging.WARNING)
    trainer, saver = saving(folder, parallel__tp=2)

    def save() -> list[str]:
        trainer.step()
        save_checkpoint(trainer, saver)
        saver.wait()
        return sorted(path.name for path in (folder / "checkpoints").iterdir())

    seen: dict[str, Any] = {"good": save()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    seen["too large"], seen["too large error"] = save(), saver.last.error
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SPARE_BYTES", 1 << 60)
        seen["full"], seen["full error"] = save(), saver.last.error
    seen["good again"], seen["good error"] = save(), saver.last.error
    saver.finish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SPARE_BYTES", 1 << 60)
        save()
    try:
        saver.finish()
    except module.SaveError as error:
        seen["end"] = str(error)
    seen["lines"] = lines
    return seen


def test_a_failed_write_leaves_the_old_ones_and_the_next_save_works(tmp_path: Path) -> None:
    first, second = run_ranks(2, fail_then_work, tmp_path)
    for seen in (first, second):
        assert seen["good"] == seen["too large"] == seen["full"] == ["latest", "step-00000001"], "and no half one takes room"
        assert seen["too large error"].startswith("rank 1: OSError: [Errno 27] File too large")
        assert "are free on the disk of" in seen["full error"]
        assert seen["good again"] == ["latest", "step-00000001", "step-00000004"]
        assert seen["good error"] is None
        assert seen["end"].startswith("the last checkpoint, of step 5, was not written: ")
    assert second["lines"] == [], "rank 0 speaks"
    assert len(first["lines"]) == 3
    assert first["lines"][0].startswith("step-00000002 was not written: rank 1: OSError: [Errno 27] File too large")
    assert first["lines"][0].endswith("the run goes on and tries again at the next one, the newest is step-00000001")


def test_a_chunk_is_written_once_and_evenly() -> None:
    """Eight ranks hold two copies of four quarters, and all hold the same numbers: the bytes come out even."""
    quarters = [Chunk("w", "float32", (64, 8), (16 * place, 0), (16, 8)) for place in range(4)]
    shared = [Chunk(f"n{number}", "float32", (64,), (0,), (64,)) for number in range(16)]
    empty = Chunk("e", "float32", (3, 8), (3, 0), (0, 8))
    count = Chunk("c", "int64", (), (), ())
    dealt = writers([[quarters[rank % 4], *shared, count, empty] for rank in range(8)])
    written = [chunk for chunks in dealt for chunk in chunks]
    assert len(written) == len(set(written)) == 4 + 16 + 1
    loads = [sum(chunk.bytes for chunk in chunks) for chunks in dealt]
    assert sum(loads) == 64 * 8 * 4 + 16 * 256 + 8
    assert max(loads) - min(loads) <= 256
    for rank, chunks in enumerate(dealt):
        assert all(quarters.index(chunk) == rank % 4 for chunk in chunks if chunk in quarters), "who does not hold it cannot write it"
        at = np.cumsum([0] + [chunk.bytes for chunk in chunks])
        assert all(start % (8 if chunk.dtype == "int64" else 4) == 0 for start, chunk in zip(at, chunks, strict=False))
    places = [chunk for entry in index_of(dealt)["tensors"].values() for chunk in entry["chunks"]]
    assert len(places) == 21
