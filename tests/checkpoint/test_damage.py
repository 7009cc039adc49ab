"""What a disk, a copy or an enemy did to a checkpoint: one line names the file, an older checkpoint is taken, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from tests.ranks import run_ranks
from tests.support import skewed_tokens, small_config
from tptrain.config import ConfigError


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def note_again(folder: Path, name: str) -> None:
    """Let the manifest agree with a changed file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "xxh3_64": xxhash.xxh3_64(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def bomb(folder: Path, name: str) -> None:
    """A pickle in a file's place, and the manifest agrees."""
    (folder / name).write_bytes(pickle.dumps(Bomb(folder.parents[1] / "exploded")))
    note_again(folder, name)


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another `tensors.json`, and the manifest agrees."""
    content = json.loads((folder / "tensors.json").read_text())
    change(content["tensors"])
    (folder / "tensors.json").write_text(json.dumps(content))
    note_again(folder, "tensors.json")


def grow(tensors: dict[str, Any]) -> None:
    """A tensor as another model has it."""
    entry = tensors["model.final_norm.weight"]
    entry["shape"], entry["chunks"][0]["shape"] = [16], [16]
    entry["chunks"] = entry["chunks"][:1]


def norm_of(tensors: dict[str, Any]) -> dict[str, Any]:
    """The entry of a tensor that has one chunk."""
    return tensors["model.final_norm.weight"]


FIRST, SECOND = "rank-00000.tensors", "rank-00001.tensors"
PASSED_OVER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "byte": (lambda f: flip(f / SECOND), f"/{SECOND} is not what was written: its checksum differs from the manifest's"),
    "truncated": (lambda f: os.truncate(f / FIRST, 1000), f"/{FIRST} has 1,000 bytes, and the manifest says "),
    "longer": (lambda f: (f / FIRST).open("ab").write(b"x"), f"/{FIRST} has "),
    "deleted": (lambda f: (f / FIRST).unlink(), f"/{FIRST} is missing"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "/manifest.json is empty"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "/manifest.json is missing"),
    "pickled manifest": (lambda f: bomb_manifest(f), "/manifest.json is no JSON"),
    "outside": (lambda f: (f / "manifest.json").write_text('{"format": 1, "files": {"../x": {}}}'), "/manifest.json names '../x'"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text('{"format": 1, "files": {"a": 3}}'),
        "/manifest.json does not say bytes",
    ),
    "state": (lambda f: flip(f / "state.json"), "/state.json is not what was written"),
    "index": (lambda f: flip(f / "tensors.json"), "/tensors.json is not what was written"),
}
"""What the next start passes over, and its line."""
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled index": (lambda f: bomb(f, "tensors.json"), "/tensors.json is no JSON"),
    "shape": (lambda f: change_index(f, grow), "has model.final_norm.weight as [16], not [32]: use a checkpoint of this model"),
    "no tensor": (lambda f: change_index(f, lambda t: t.pop("model.final_norm.weight")), "has no model.final_norm.weight: use"),
    "dtype": (lambda f: change_index(f, lambda t: norm_of(t).update(dtype="object")), "/tensors.json is no list of tensors (Value"),
    "hole": (lambda f: change_index(f, lambda t: t["model.embedding.weight"]["chunks"].pop()), "numbers of model.embedding.weight"),
    "beyond": (lambda f: change_index(f, lambda t: norm_of(t)["chunks"][0].update(at=1 << 40)), "puts a part of model.final_norm.weight"),
}
"""What agrees with its manifest and still cannot be loaded: somebody made it so."""


def bomb_manifest(folder: Path) -> None:
    """A pickle in the manifest's place, and one where torch's own format has it."""
    for name in ("manifest.json", ".metadata"):
        (folder / name).write_bytes(pickle.dumps(Bomb(folder.parents[1] / "exploded")))


def new_trainer() -> Any:
    """A trainer of two ranks, after no step."""
    from tptrain.data.dataset import Data
    from tptrain.mesh import build_mesh
    from tptrain.trainer import Trainer

    config = small_config(parallel__tp=2, model__num_layers=2)
    return Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, skewed_tokens(2000, 257)))


def start_from(trainer: Any, run_dir: Path) -> tuple[int, str]:
    """The step that a run goes on from, and what is said; or -1 and the refusal."""
    from tptrain.train import resume

    trainer.steps_done = 0
    try:
        resume(trainer, run_dir)
    except ConfigError as error:
        return -1, str(error)
    return trainer.steps_done, ""


def damage_and_start(rank: int, folder: Path) -> dict[str, Any]:
    """Save steps 2 and 4; then, for each damage to a copy of step 4, start."""
    import logging

    import torch.distributed as dist

    from tptrain.checkpoint.saver import Saver
    from tptrain.mesh import background_group
    from tptrain.train import save_checkpoint

    trainer = new_trainer()
    trainer.config.checkpoint.async_save = True
    saver = Saver(folder / "run", trainer.config.checkpoint, background_group(60))
    for step in range(1, 5):
        trainer.step()
        if step % 2 == 0:
            save_checkpoint(trainer, saver)
    saver.finish()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tptrain").addHandler(handler)
    outcomes: dict[str, Any] = {}
    damages = {"nothing": (lambda f: None, ""), **PASSED_OVER, **REFUSED}
    damages["latest"] = (lambda f: (f.parent / "latest").write_text("step-00000009\n"), "")
    damages["both"] = (lambda f: (flip(f / FIRST), (f.with_name("step-00000002") / FIRST).unlink()), "")
    for name, (damage, _) in damages.items():
        run_dir = folder / name.replace(" ", "_")
        if rank == 0:
            shutil.copytree(folder / "run", run_dir)
            damage(run_dir / "checkpoints/step-00000004")
        dist.barrier(group=trainer.mesh.world)
        lines.clear()
        step, refusal = start_from(trainer, run_dir)
        outcomes[name] = (step, [*lines, refusal] if refusal else list(lines))
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By damage: on each rank, the step that the run goes on from and the lines that were said."""
    folder = tmp_path_factory.mktemp("damage")
    first, second = run_ranks(2, damage_and_start, folder)
    assert {name: step for name, (step, _) in first.items()} == {name: step for name, (step, _) in second.items()}
    assert all(second[name] == first[name] for name in (*REFUSED, "both")), "all ranks refuse in the same words"
    return {"folder": folder, **first}


def test_what_is_whole_is_loaded_without_a_word(outcomes: dict[str, Any]) -> None:
    assert outcomes["nothing"] == (4, [])


@pytest.mark.parametrize("name", PASSED_OVER)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(name: str, outcomes: dict[str, Any]) -> None:
    step, lines = outcomes[name]
    assert step == 2
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert f"checkpoints/step-00000004{PASSED_OVER[name][1]}" in lines[0]
    assert lines[0].endswith("; kept as step-00000004.damaged; the run goes on from step-00000002")
    left = sorted(path.name for path in (outcomes["folder"] / name.replace(" ", "_") / "checkpoints").iterdir())
    assert left == ["latest", "step-00000002", "step-00000004.damaged"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_made_to_look_whole_is_refused(name: str, outcomes: dict[str, Any]) -> None:
    step, lines = outcomes[name]
    assert step == -1
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert lines[0].startswith("checkpoint.resume=")
    assert REFUSED[name][1] in lines[0]


def test_no_pickle_is_opened(outcomes: dict[str, Any]) -> None:
    assert {"pickled index", "pickled manifest"} <= outcomes.keys()
    assert not list(outcomes["folder"].rglob("exploded"))
    pickle.loads(pickle.dumps(Bomb(outcomes["folder"] / "exploded")))
    assert (outcomes["folder"] / "exploded").exists(), "the bomb works"


def test_a_latest_that_names_nothing(outcomes: dict[str, Any]) -> None:
    step, lines = outcomes["latest"]
    assert step == 4
    assert len(lines) == 1
    assert lines[0].endswith("latest names step-00000009, which is no checkpoint here; the run goes on from step-00000004")


def test_nothing_left_to_go_on_from_is_refused(outcomes: dict[str, Any]) -> None:
    """Not a new start at step 0 in a run folder that has come far."""
    step, lines = outcomes["both"]
    assert step == -1
    assert "finds no checkpoint that can be used: " in lines[0]
    assert "step-00000004/rank-00000.tensors is not what was written" in lines[0]
