"""A checkpoint folder is complete or absent, whatever is killed when."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tests.support import small_config
from tptrain.checkpoint.folder import checkpoint_folder, complete_checkpoints, make_room, partial_folder, publish, read_state, rotate


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


def test_publishing_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 5)
    again = partial_folder(checkpoint_folder(tmp_path / "checkpoints", 5))
    again.mkdir()
    (again / "other").write_text("new")
    final = publish(again, {"step": 5})
    assert sorted(path.name for path in final.iterdir()) == ["manifest.json", "other", "state.json"]


def test_rotate_keeps_the_newest_and_every_so_many_and_clears_leftovers(tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    for step in (1, 2, 3, 10, 20, 21, 100_000_000):
        write(tmp_path, step)
    (home / "step-00000005.damaged").mkdir()
    rotate(home, keep=2, keep_every=10)
    assert [path.name for path in complete_checkpoints(home)] == ["step-00000010", "step-00000020", "step-00000021", "step-100000000"]
    partial_folder(checkpoint_folder(home, 11)).mkdir()
    (home / "step-00000000.deleted").mkdir()
    rotate(home, keep=2)
    left = ["latest", "step-00000005.damaged", "step-00000021", "step-100000000"]
    assert sorted(path.name for path in home.iterdir()) == left, "what is damaged is for people to look at"
    partial_folder(checkpoint_folder(home, 11)).mkdir()
    make_room(partial_folder(checkpoint_folder(home, 12)))
    assert sorted(path.name for path in home.iterdir()) == sorted([*left, "step-00000012.partial"]), (
        "before a save, for the disk may be full"
    )
