"""A checkpoint folder is complete or absent, whatever is killed when."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support import small_config
from tptrain.checkpoint.folder import checkpoint_folder, complete_checkpoints, find_start, partial_folder, publish, read_state, rotate
from tptrain.config import ConfigError


def write(run_dir: Path, step: int) -> Path:
    """A complete checkpoint with one file in it."""
    partial = partial_folder(checkpoint_folder(run_dir, step))
    partial.mkdir(parents=True)
    (partial / "data").write_text(str(step))
    return publish(partial, {"step": step, "config": asdict(small_config())})


def test_publish_makes_it_the_newest(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path) == []
    first, second = write(tmp_path, 5), write(tmp_path, 10)
    assert complete_checkpoints(tmp_path) == [first, second]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000010\n"
    assert read_state(second)["step"] == 10
    assert (second / "data").read_text() == "10"


def test_a_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    done = write(tmp_path, 5)
    partial_folder(checkpoint_folder(tmp_path, 10)).mkdir()
    assert complete_checkpoints(tmp_path) == [done]
    assert find_start(small_config(), tmp_path) == done


def test_publishing_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 5)
    again = partial_folder(checkpoint_folder(tmp_path, 5))
    again.mkdir()
    (again / "other").write_text("new")
    final = publish(again, {"step": 5})
    assert sorted(path.name for path in final.iterdir()) == ["other", "state.json"]


def test_rotate_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3, 10)]
    partial_folder(checkpoint_folder(tmp_path, 11)).mkdir()
    (tmp_path / "checkpoints/step-00000000.deleted").mkdir()
    rotate(tmp_path, keep=2)
    assert complete_checkpoints(tmp_path) == folders[2:]
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
