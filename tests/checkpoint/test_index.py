"""A `tensors.json` that somebody made: it is named as damage, nothing outside of the folder is read, and no code runs."""

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
import torch.distributed as dist

from tptrain.checkpoint.index import read_index
from tptrain.checkpoint.manifest import DamagedCheckpoint
from tptrain.checkpoint.sharded import read_tensors, write_tensors


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def tensors() -> dict[str, torch.Tensor]:
    """Two matrices, of which one has tiles, and a number."""
    return {"w": torch.arange(512 * 512.0).view(512, 512), "v": torch.arange(6.0).view(2, 3) + 0.5, "step": torch.tensor(7.0)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that one process wrote."""
    folder = tmp_path_factory.mktemp("index") / "whole"
    folder.mkdir()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    write_tensors(folder, tensors(), dist.group.WORLD)
    dist.destroy_process_group()
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """What a folder holds."""
    found = {name: torch.full_like(tensor, -1) for name, tensor in tensors().items()}
    read_tensors(folder, found, None)
    return found


def test_a_whole_one_is_read(whole: Path) -> None:
    found = read(whole)
    assert all(found[name].equal(tensor) for name, tensor in tensors().items())
    (chunk,) = read_index(whole)["w"].chunks.values()
    assert len(read_index(whole)["w"].tiles(chunk)) == 8, "1 MiB in tiles of 128 KiB"


Entry = dict[str, Any]
CHANGES: dict[str, tuple[Callable[[Entry], Any], str]] = {
    "outside": (lambda e: chunk(e).update(file="../whole/rank-00000.tensors"), "no name of a file for a chunk"),
    "absolute": (lambda e: chunk(e).update(file="/etc/passwd"), "no name of a file for a chunk"),
    "another": (lambda e: chunk(e).update(file="state.json"), "no name of a file for a chunk"),
    "line": (lambda e: chunk(e).update(file="rank-00000.tensors\n"), "no name of a file for a chunk"),
    "no file": (lambda e: chunk(e).pop("file"), "no name of a file for a chunk"),
    "dtype": (lambda e: e.update(dtype="object"), "an unknown dtype"),
    "listed dtype": (lambda e: e.update(dtype=["float32"]), "an unknown dtype"),
    "shape": (lambda e: e.update(shape="23"), "a wrong shape"),
    "negative": (lambda e: e.update(shape=[2, -3]), "a wrong shape"),
    "fraction": (lambda e: e.update(shape=[2, 3.0]), "a wrong shape"),
    "empty": (lambda e: e.update(shape=[0, 3]), "an empty shape"),
    "larger": (lambda e: e.update(shape=[2, 4]), "chunks that do not cover [2, 4] once"),
    "parts": (lambda e: e.update(parts=[3, 1]), "wrong parts"),
    "many parts": (lambda e: e.update(parts=[1 << 40, 1]), "wrong parts"),
    "no chunks": (lambda e: e.update(chunks={}), "no chunks"),
    "hole": (lambda e: e.update(chunks=[]), "chunks that do not cover [2, 3] once"),
    "twice": (lambda e: e["chunks"].append(dict(chunk(e))), "chunks that do not cover [2, 3] once"),
    "overlap": (lambda e: e["chunks"].append(dict(chunk(e), offset=[1, 0], size=[1, 3])), "chunks that do not cover [2, 3] once"),
    "half": (lambda e: chunk(e).update(size=[1, 3]), "chunks that do not cover [2, 3] once"),
    "nothing": (lambda e: chunk(e).update(size=[0, 3]), "a wrong offset or size of a chunk"),
    "dimensions": (lambda e: chunk(e).update(offset=[0]), "a wrong offset or size of a chunk"),
    "before": (lambda e: chunk(e).update(at=-4), "a wrong at"),
    "true": (lambda e: chunk(e).update(at=True), "a wrong at"),
    "odd": (lambda e: chunk(e).update(at=2), "a chunk that begins within a number"),
    "checksum": (lambda e: chunk(e).update(xxh3_64="0" * 15), "too many or too few checksums"),
    "no checksum": (lambda e: chunk(e).pop("xxh3_64"), "wrong checksums"),
    "words": (lambda e: chunk(e).update(xxh3_64="checksumchecksum"), "wrong checksums"),
    "not even": (lambda e: e["chunks"].append(3), "no name of a file for a chunk"),
}
"""What is changed of the entry of `v`, and what is said of tensors.json."""


def chunk(entry: Entry) -> Entry:
    """The only chunk of an entry."""
    return entry["chunks"][0]


def copy(whole: Path, to: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(whole, to / "copy"))


def change(folder: Path, alter: Callable[[Entry], Any], name: str = "v") -> None:
    """Another entry in `tensors.json`."""
    content = json.loads((folder / "tensors.json").read_text())
    alter(content["tensors"][name])
    (folder / "tensors.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    change(folder, CHANGES[name][0])
    with pytest.raises(DamagedCheckpoint) as caught:
        read(folder)
    assert caught.value.path == folder / "tensors.json"
    assert caught.value.reason == f"is wrong about 'v': {CHANGES[name][1]}"
    assert "\n" not in str(caught.value)


BYTES = 4 * (512 * 512 + 6 + 1)
RANK, INDEX = "rank-00000.tensors", "tensors.json"
PLACE = f"has {BYTES:,} bytes, but tensors.json has a part of 'v' end at byte {(1 << 40) + 24:,}"
PAST = f"has {BYTES - 1:,} bytes, but tensors.json has a part of "
FORMAT = "is no list of tensors of format 1"
FILES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "beyond": (lambda f: change(f, lambda e: chunk(e).update(at=1 << 40)), RANK, PLACE),
    "elsewhere": (lambda f: change(f, lambda e: chunk(e).update(at=0)), RANK, "is not what was written: bytes 0 to 24, of v, have"),
    "no such file": (lambda f: change(f, lambda e: chunk(e).update(file="rank-00007.tensors")), "rank-00007.tensors", "is missing"),
    "shorter": (lambda f: os.truncate(f / RANK, BYTES - 1), RANK, PAST),
    "deleted": (lambda f: (f / RANK).unlink(), RANK, "is missing"),
    "a link": (lambda f: link_to(f, f.parent / "secret"), RANK, "is no regular file"),
    "a flipped bit": (lambda f: flip(f / RANK, 700_001), RANK, "is not what was written: bytes 655,360 to 786,432, of w, have another"),
    "not its format": (lambda f: (f / INDEX).write_text('{"format": 2, "tensors": {}}'), INDEX, FORMAT),
    "no tensors": (lambda f: (f / INDEX).write_text('{"format": 1}'), INDEX, FORMAT),
    "a pickle": (lambda f: (f / INDEX).write_bytes(pickle.dumps(Bomb(f.parent / "exploded"))), INDEX, "is no JSON"),
    "torch's own": (lambda f: bomb(f), INDEX, "is missing"),
}
"""Damage, the file that is named and what is said of it."""


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def link_to(folder: Path, secret: Path) -> None:
    """The tensors' file leads to another of the same content."""
    (folder / "rank-00000.tensors").rename(secret)
    (folder / "rank-00000.tensors").symlink_to(secret)


def bomb(folder: Path) -> None:
    """A pickle where torch's own format has one, and as its values."""
    (folder / "tensors.json").unlink()
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


@pytest.mark.parametrize("name", FILES)
def test_the_broken_file_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    damage, file, reason = FILES[name]
    folder = copy(whole, tmp_path)
    damage(folder)
    with pytest.raises(DamagedCheckpoint) as caught:
        read(folder)
    assert caught.value.path == folder / file
    assert caught.value.reason.startswith(reason)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_every_byte_is_guarded(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    for at in (0, 131_071, 131_072, BYTES - 1):
        flip(folder / "rank-00000.tensors", at)
        with pytest.raises(DamagedCheckpoint, match="is not what was written"):
            read(folder)
        flip(folder / "rank-00000.tensors", at)
    read(folder)


def test_a_link_beside_the_checkpoint_is_no_matter(whole: Path, tmp_path: Path) -> None:
    """The folder itself may be reached by a link."""
    (tmp_path / "there").symlink_to(whole)
    assert read(tmp_path / "there")["step"] == 7
