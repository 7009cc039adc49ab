"""The manifest names the file that is not what it was."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tptrain.checkpoint.manifest import DamagedCheckpoint, check_manifest, write_manifest

STATE = b'{"step": 4}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and their manifest."""
    (tmp_path / "state.json").write_bytes(STATE)
    (tmp_path / "rank-00000.tensors").write_bytes(bytes(1000))
    write_manifest(tmp_path)
    return tmp_path


def test_it_says_sizes_and_checksums_and_a_whole_folder_passes(folder: Path) -> None:
    check_manifest(folder)
    content = json.loads((folder / "manifest.json").read_text())
    state = {"bytes": len(STATE), "xxh3_64": f"{xxhash.xxh3_64_intdigest(STATE):016x}"}
    assert content == {"format": 1, "files": {"rank-00000.tensors": {"bytes": 1000}, "state.json": state}}


def test_it_is_the_same_when_written_again(folder: Path) -> None:
    first = (folder / "manifest.json").read_bytes()
    write_manifest(folder)
    assert (folder / "manifest.json").read_bytes() == first


def rewrite(folder: Path, **files: Any) -> None:
    """A manifest with other notes."""
    content = json.loads((folder / "manifest.json").read_text())
    content["files"].update(files)
    (folder / "manifest.json").write_text(json.dumps(content))


def link(folder: Path) -> None:
    """A link to a file elsewhere, as long as the true one."""
    elsewhere = folder.with_name("elsewhere")
    (folder / "rank-00000.tensors").rename(elsewhere)
    (folder / "rank-00000.tensors").symlink_to(elsewhere)


def pipe(folder: Path) -> None:
    """A file that never ends."""
    (folder / "rank-00000.tensors").unlink()
    os.mkfifo(folder / "rank-00000.tensors")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json", "is missing"),
    "emptied": (lambda f: (f / "manifest.json").write_text(""), "manifest.json", "is empty"),
    "half of it": (lambda f: os.truncate(f / "manifest.json", 40), "manifest.json", "is no JSON"),
    "a pickle": (lambda f: (f / "manifest.json").write_bytes(pickle.dumps([1])), "manifest.json", "is no JSON"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json", "is no JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json", "is no manifest of format 1"),
    "a folder": (lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()), "state.json", "is no regular file"),
    "outside": (lambda f: rewrite(f, **{"../x": {"bytes": 1}}), "manifest.json", "names '../x', which is no file of this folder"),
    "absolute": (lambda f: rewrite(f, **{"/etc/hosts": {"bytes": 1}}), "manifest.json", "names '/etc/hosts', which is no"),
    "up": (lambda f: rewrite(f, **{"..": {"bytes": 1}}), "manifest.json", "names '..', which is no file of this folder"),
    "no size": (lambda f: rewrite(f, **{"rank-00000.tensors": {}}), "manifest.json", "does not say how long rank-00000.tensors is"),
    "true": (lambda f: rewrite(f, **{"rank-00000.tensors": {"bytes": True}}), "manifest.json", "does not say how long rank-00000"),
    "no checksum": (lambda f: rewrite(f, **{"state.json": {"bytes": len(STATE)}}), "manifest.json", "does not say how long state.json"),
    "truncated": (
        lambda f: os.truncate(f / "rank-00000.tensors", 999),
        "rank-00000.tensors",
        "has 999 bytes, and manifest.json says 1,000",
    ),
    "longer": (lambda f: os.truncate(f / "rank-00000.tensors", 1001), "rank-00000.tensors", "has 1,001 bytes, and"),
    "deleted": (lambda f: (f / "rank-00000.tensors").unlink(), "rank-00000.tensors", "is missing"),
    "a link": (link, "rank-00000.tensors", "is no regular file"),
    "a pipe": (pipe, "rank-00000.tensors", "is no regular file"),
    "a byte": (lambda f: (f / "state.json").write_bytes(STATE.replace(b"4", b"5")), "state.json", "is not what was written"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_broken_file_is_named_in_one_line(name: str, folder: Path) -> None:
    damage, file, reason = DAMAGE[name]
    damage(folder)
    with pytest.raises(DamagedCheckpoint) as caught:
        check_manifest(folder)
    assert caught.value.path == folder / file
    assert caught.value.reason.startswith(reason)
    assert str(caught.value) == f"{folder / file} {caught.value.reason}"
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.reason) == (caught.value.path, caught.value.reason), "it can travel to other ranks"
