"""Which checkpoint a run starts from: by its folder alone, and with ranks that read it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.checkpoint.test_folder import write
from tests.ranks import run_ranks
from tests.saving import save_now, start_from
from tests.support import small_config
from tptrain.checkpoint.folder import checkpoint_folder, partial_folder, publish
from tptrain.checkpoint.start import find_start, make_home, pass_over
from tptrain.config import Config, ConfigError, DataConfig
from tptrain.data_config import MixturePart, SourceConfig


def test_where_a_run_starts(tmp_path: Path) -> None:
    config = small_config()
    assert find_start(config, tmp_path) is None
    done = write(tmp_path, 5)
    assert find_start(config, tmp_path) == done
    config.checkpoint.resume = "never"
    assert find_start(config, tmp_path / "elsewhere") is None
    with pytest.raises(ConfigError, match=r"checkpoint.resume=never would overwrite .*step-00000005, which is further: use"):
        find_start(config, tmp_path)
    config.checkpoint.resume = str(done)
    assert find_start(config, tmp_path / "elsewhere") == done
    config.checkpoint.resume = str(tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint.resume=.* is no checkpoint folder: use auto, never or the path of"):
        find_start(config, tmp_path)


def mixed(**changes: Any) -> Config:
    """A mixture of two sources, of which `code` has some other values."""
    config = small_config()
    wiki = MixturePart("jsonl", path="wiki.jsonl", weight=0.7)
    config.data = DataConfig("mixture", seq_len=16, mixture={"wiki": wiki, "code": MixturePart("text", **{"path": "code", **changes})})
    return config


def start_of(asked: Config, saved: Config, folder: Path) -> str:
    """What comes of resuming a run of `saved` as `asked`: empty, or the refusal."""
    partial = partial_folder(checkpoint_folder(folder / "checkpoints", 5))
    partial.mkdir(parents=True)
    publish(partial, json.loads(json.dumps({"step": 5, "config": asdict(saved)})))
    try:
        find_start(asked, folder)
    except ConfigError as error:
        return str(error).replace(str(folder), "RUN")
    return ""


def test_a_run_goes_on_with_the_same_data_only(tmp_path: Path) -> None:
    end = "of RUN/checkpoints/step-00000005: use"
    other = "or another hydra.run.dir"
    expected = "data.mixture.code.weight=0.5 differs from 1.0 " + end + " data.mixture.code.weight=1.0, " + other
    assert start_of(mixed(weight=0.5), mixed(), tmp_path / "weight") == expected
    asked = mixed()
    asked.data.temperature = 2.0
    expected = f"data.temperature=2.0 differs from 1.0 {end} data.temperature=1.0, {other}"
    assert start_of(asked, mixed(), tmp_path / "temperature") == expected
    asked = mixed()
    asked.data.mixture["books"] = MixturePart("text", path="books")
    expected = f"data.mixture=[books,code,wiki] differs from [code,wiki] {end} data.mixture=[code,wiki], {other}"
    assert start_of(asked, mixed(), tmp_path / "more") == expected
    asked = mixed()
    asked.data.tokenizer.end_token = "<end>"
    assert start_of(asked, mixed(), tmp_path / "token").startswith("data.tokenizer.end_token=<end> differs from null of ")
    asked.data.tokenizer.end_token = None
    asked.data.val_fraction = 0.5
    assert start_of(asked, mixed(), tmp_path / "fraction").startswith("data.val_fraction=0.5 differs from 0.05 of ")
    asked.data = DataConfig("memorize", seq_len=16, vocab_size=64)
    saved = replace(asked, data=replace(asked.data, vocab_size=128))
    assert start_of(asked, saved, tmp_path / "drawn").startswith("data.vocab_size=64 differs from 128 of ")


def test_what_may_change_between_two_starts(tmp_path: Path) -> None:
    asked = mixed(path="moved/code", revision="v1")
    asked.data.mixture = dict(reversed(asked.data.mixture.items()))
    asked.data.val_sets = {"books": SourceConfig("text", path="books")}
    asked.data.num_proc, asked.data.store_dir, asked.data.document_mask = 3, "elsewhere", True
    assert start_of(asked, mixed(), tmp_path) == ""


def test_an_older_checkpoint_may_lack_keys(tmp_path: Path) -> None:
    partial = partial_folder(checkpoint_folder(tmp_path / "checkpoints", 5))
    partial.mkdir(parents=True)
    saved = asdict(small_config())
    for name in ("mixture", "temperature", "streaming", "tokenizer"):
        del saved["data"][name]
    final = publish(partial, {"step": 5, "config": saved})
    assert find_start(small_config(), tmp_path) == final


# ---- damage, seen without reading the tensors --------------------------------------------------------------


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def test_a_damaged_one_is_passed_over_and_set_aside(tmp_path: Path) -> None:
    oldest, older, newest = (write(tmp_path, step) for step in (3, 5, 10))
    lose_manifest(newest)
    (older / "data").write_text("longer than it was")
    damage: dict[Path, str] = {}
    assert find_start(small_config(), tmp_path, damage) == oldest
    assert list(damage) == [newest, older]
    assert newest.is_dir(), "looking changes nothing"
    first, second = pass_over(damage, oldest)
    assert first == f"{newest}/manifest.json is missing; kept as step-00000010.damaged; the run goes on from step-00000003"
    assert second.startswith(f"{older}/data has 18 bytes, and ")
    left = ["latest", "step-00000003", "step-00000005.damaged", "step-00000010.damaged"]
    assert sorted(path.name for path in newest.parent.iterdir()) == left
    assert (newest.parent / "latest").read_text() == "step-00000003\n"
    assert find_start(small_config(), tmp_path, {}) == oldest


def test_nothing_left_to_go_on_from_is_refused(tmp_path: Path) -> None:
    """Not a new start at step 0 in the folder of a run that has come far, now or at the next try."""
    older, newest = write(tmp_path, 5), write(tmp_path, 10)
    for folder in (older, newest):
        lose_manifest(folder)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"checkpoint.resume=auto finds no checkpoint .* used: .*0010/manifest.json is missing: "):
            find_start(small_config(), tmp_path)
    config = small_config(checkpoint__resume=str(newest))
    with pytest.raises(ConfigError, match=r"checkpoint.resume=.*0010 cannot be used: .*/manifest.json is missing: use auto, or"):
        find_start(config, tmp_path)


@pytest.mark.parametrize("content", ["step-00000099\n", "", "../../etc", "\udcff", "step-00000005"])
def test_a_latest_that_names_nothing_is_told_and_written_again(content: str, tmp_path: Path) -> None:
    done = write(tmp_path, 5)
    latest = done.parent / "latest"
    latest.write_bytes(content.encode(errors="surrogateescape"))
    damage: dict[Path, str] = {}
    assert find_start(small_config(), tmp_path, damage) == done
    lines = pass_over(damage, done)
    assert len(lines) == (content != "step-00000005")
    for line in lines:
        assert line.startswith(f"{latest} names ")
        assert line.endswith("which is no checkpoint there; the run goes on from step-00000005")
        assert "\n" not in line
    assert latest.read_text().strip() == "step-00000005"


def test_a_state_that_is_none_is_damage_though_the_manifest_agrees(tmp_path: Path) -> None:
    for number, state in enumerate(({}, {"step": "9", "config": {}}, {"step": 9}, {"step": 9, "config": {"model": 3}})):
        older = write(tmp_path / str(number), 5)
        partial = partial_folder(checkpoint_folder(older.parent, 9))
        partial.mkdir()
        publish(partial, state)
        damage: dict[Path, str] = {}
        assert find_start(small_config(), tmp_path / str(number), damage) == older
        assert [line.endswith("/state.json is no training state") for line in damage.values()] == [True]


def test_checkpoints_may_be_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config(checkpoint__dir="disk/mine")
    make_home(config)
    assert config.checkpoint.dir == str(tmp_path / "disk/mine"), "another command may be started elsewhere"
    done = write(tmp_path, 5)
    done.rename(tmp_path / "disk/mine/step-00000005")
    assert find_start(config, tmp_path) == tmp_path / "disk/mine/step-00000005"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"checkpoint.dir=file/below cannot be written \(Not a directory\): use a folder"):
        make_home(small_config(checkpoint__dir="file/below"))


# ---- with ranks that read it -------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


SECOND = "rank-00001.tensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (lambda folder: flip(folder / SECOND), f"/{SECOND} is not what was written: "),
    "cut": (lambda folder: os.truncate(folder / SECOND, 1000), f"/{SECOND} has 1,000 bytes, and "),
    "missing": (lambda folder: (folder / SECOND).unlink(), f"/{SECOND} is missing"),
    "emptied": (lambda folder: (folder / "manifest.json").write_text(""), "/manifest.json is empty"),
}


def trainer_of(**changes: Any) -> Any:
    """A trainer of two ranks, after no step."""
    import torch

    from tests.support import skewed_tokens
    from tptrain.data.dataset import Data
    from tptrain.mesh import build_mesh
    from tptrain.trainer import Trainer

    config = small_config(parallel__tp=2, **{"model__num_layers": 2, **changes})
    return Trainer(config, build_mesh(config.parallel, torch.device("cpu"), 60), Data.of_tokens(config, skewed_tokens(2000, 257)))


def begin(trainer: Any, run_dir: Path) -> tuple[int, list[str]]:
    """Where a run goes on from and what is said; or -1 and the refusal."""
    import logging

    lines: list[str] = []
    trainer.steps_done = 0
    with mock.patch.object(logging.getLogger("tptrain"), "warning", lines.append):
        try:
            start_from(trainer, run_dir)
        except ConfigError as error:
            return -1, [str(error)]
    return trainer.steps_done, lines


def damage_and_begin(rank: int, folder: Path) -> dict[str, Any]:
    """Save steps 2 and 4; then begin with copies of it, each damaged in one way."""
    import torch.distributed as dist

    trainer = trainer_of()
    for step in range(1, 5):
        trainer.step()
        if step % 2 == 0:
            save_now(trainer, folder / "run")
    both = (lambda newest: (flip(newest / SECOND), flip(newest.with_name("step-00000002") / SECOND)), "")
    outcomes: dict[str, Any] = {}
    for name, (damage, _) in {"none": (lambda newest: None, ""), **DAMAGES, "both": both}.items():
        if rank == 0:
            shutil.copytree(folder / "run", folder / name)
            damage(folder / name / "checkpoints/step-00000004")
        dist.barrier(group=trainer.mesh.world)
        outcomes[name] = begin(trainer, folder / name)
    trainer.config.checkpoint.resume = str(folder / "both/checkpoints/step-00000004")
    outcomes["path"] = begin(trainer, folder / "other")
    other = trainer_of(model__num_layers=3)
    other.config.model.num_layers = 2  # as a checkpoint would have it that lies about its model
    outcomes["model"] = begin(other, folder / "none")
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By damage, on each rank: the step that the run goes on from, and what is said."""
    folder = tmp_path_factory.mktemp("damage")
    first, second = run_ranks(2, damage_and_begin, folder)
    for name, (step, lines) in second.items():
        assert step == first[name][0]
        assert lines == (first[name][1] if step == -1 else []), "all ranks refuse in the same words, and rank 0 warns"
    return {"folder": folder, **first}


def test_what_is_whole_is_loaded_without_a_word(outcomes: dict[str, Any]) -> None:
    assert outcomes["none"] == (4, [])


@pytest.mark.parametrize("name", DAMAGES)
def test_ranks_go_on_from_an_older_one(name: str, outcomes: dict[str, Any]) -> None:
    step, lines = outcomes[name]
    home = outcomes["folder"] / name / "checkpoints"
    assert step == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"{home}/step-00000004{DAMAGES[name][1]}")
    assert lines[0].endswith("; kept as step-00000004.damaged; the run goes on from step-00000002")
    assert sorted(path.name for path in home.iterdir()) == ["latest", "step-00000002", "step-00000004.damaged"]


def test_ranks_refuse_what_none_can_read(outcomes: dict[str, Any]) -> None:
    step, (line,) = outcomes["both"]
    assert step == -1
    assert f"/step-00000004/{SECOND} is not what was written: " in line
    assert len(list((outcomes["folder"] / "both/checkpoints").glob("*.damaged"))) == 0
    step, (line,) = outcomes["path"]
    assert step == -1
    assert f" cannot be used: {outcomes['folder']}/both/checkpoints/step-00000004/{SECOND} is not what was written: " in line


def test_ranks_refuse_tensors_that_do_not_fit(outcomes: dict[str, Any]) -> None:
    step, (line,) = outcomes["model"]
    assert step == -1
    assert line.startswith("checkpoint.resume=auto finds another model's checkpoint: ")
    assert "has no model.layers.2." in line
    assert line.endswith("use one of this model and optimizer")
