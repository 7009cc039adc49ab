"""A checkpoint folder is complete or absent, whatever is killed when."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import small_config
from tptrain.checkpoint.folder import checkpoint_folder, complete_checkpoints, partial_folder, publish, read_state, rotate
from tptrain.checkpoint.start import find_start
from tptrain.config import Config, ConfigError, DataConfig
from tptrain.data_config import MixturePart, SourceConfig


def write(run_dir: Path, step: int) -> Path:
    """A complete checkpoint with one file in it."""
    partial = partial_folder(checkpoint_folder(run_dir / "checkpoints", step))
    partial.mkdir(parents=True)
    (partial / "data").write_text(str(step))
    return publish(partial, {"step": step, "config": asdict(small_config())})


def test_publish_makes_it_the_newest(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "checkpoints") == []
    first, second = write(tmp_path, 5), write(tmp_path, 10)
    assert complete_checkpoints(tmp_path / "checkpoints") == [first, second]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000010\n"
    assert read_state(second)["step"] == 10
    assert (second / "data").read_text() == "10"


def test_a_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    done = write(tmp_path, 5)
    partial_folder(checkpoint_folder(tmp_path / "checkpoints", 10)).mkdir()
    assert complete_checkpoints(tmp_path / "checkpoints") == [done]
    assert find_start(small_config(), tmp_path) == done


def test_publishing_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 5)
    again = partial_folder(checkpoint_folder(tmp_path / "checkpoints", 5))
    again.mkdir()
    (again / "other").write_text("new")
    final = publish(again, {"step": 5})
    assert sorted(path.name for path in final.iterdir()) == ["manifest.json", "other", "state.json"]


def test_rotate_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3, 10)]
    partial_folder(checkpoint_folder(tmp_path / "checkpoints", 11)).mkdir()
    (tmp_path / "checkpoints/step-00000000.deleted").mkdir()
    rotate(tmp_path / "checkpoints", keep=2)
    assert complete_checkpoints(tmp_path / "checkpoints") == folders[2:]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000003", "step-00000010"]


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
