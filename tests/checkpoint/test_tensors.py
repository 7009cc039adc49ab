"""Tensors written by four ranks under one layout and read under another, by ranks, by one process, by a background thread, by numpy.

Tiles are made small here, so that small tensors have many.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tptrain.checkpoint.manifest import write_manifest
from tptrain.config import ConfigError

SHAPES = {
    "matrix": (50, 36), "long": (3, 400), "vector": (301,), "short": (2,), "number": (), "box": (6, 5, 7), "counts": (40, 8),
    "half": (33, 20),
}  # fmt: skip
INTEGERS, HALVES = ("counts",), ("half",)
ROOT = Path(__file__).parents[2]


def values_of(name: str) -> np.ndarray:
    """What a whole tensor holds: no two numbers are equal."""
    count = int(np.prod(SHAPES[name], dtype=np.int64))
    first = 10_000 * list(SHAPES).index(name)
    if name in HALVES:
        return (np.arange(count) % 250).astype(np.float32).reshape(SHAPES[name])  # bfloat16 has these
    return np.arange(first, first + count).astype(np.int64 if name in INTEGERS else np.float32).reshape(SHAPES[name])


def whole(name: str) -> Any:
    """The same as a tensor."""
    import torch

    tensor = torch.from_numpy(values_of(name).copy())
    return tensor.to(torch.bfloat16) if name in HALVES else tensor


def layouts() -> dict[str, Any]:
    """Meshes and placements of four ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    return {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "both": (square, [Shard(0), Shard(1)]),
        "half": (square, [Replicate(), Shard(0)]),
        "all": (line, [Replicate()]),
    }


def split(name: str, mesh: Any, placements: Any) -> Any:
    """A tensor under a layout, as far as it has the dimensions: this rank's part is a copy, in memory column after column."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    tensor = whole(name)
    if tensor.dim() == 0:
        return tensor
    own = tensor
    kept = [Replicate() if isinstance(p, Shard) and p.dim >= tensor.dim() else p for p in placements]
    for dim, placement in enumerate(kept):
        if isinstance(placement, Shard):
            chunks = own.chunk(mesh.size(dim), placement.dim)
            place = mesh.get_local_rank(dim)
            own = chunks[place] if place < len(chunks) else own.narrow(placement.dim, 0, 0)
    own = own.t().contiguous().t() if own.dim() == 2 and name == "long" else own.clone()
    return DTensor.from_local(own, mesh, kept, run_check=False, shape=tensor.shape, stride=tensor.stride())


def local(tensor: Any) -> Any:
    """This rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def small_tiles() -> None:
    """Cut tensors of a few hundred bytes."""
    from tptrain.checkpoint import tiles

    tiles.TILE_BYTES, tiles.ROW_NUMBERS = 64, 4


def outcome(action: Any) -> str:
    """The error of an action, or nothing."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def write_and_read(rank: int, folder: Path) -> dict[str, Any]:
    """Every layout loads what every other saved; then what goes wrong on one rank alone."""
    import torch.distributed as dist

    from tptrain.checkpoint.sharded import read_tensors, write_tensors

    small_tiles()
    world = dist.group.WORLD
    made = layouts()
    if rank == 0:
        for name in [*made, "thread", "full"]:
            (folder / name).mkdir()
    dist.barrier(group=world)
    for name, layout in made.items():
        write_tensors(folder / name, {key: split(key, *layout) for key in SHAPES}, world)
    wrong = []
    for saved in made:
        for name, layout in made.items():
            tensors = {key: split(key, *layout) for key in SHAPES}
            for tensor in tensors.values():
                local(tensor).zero_()
            read_tensors(folder / saved, tensors, world)
            wrong += [(saved, name, key) for key in SHAPES if not local(tensors[key]).equal(local(split(key, *layout)))]
    errors = {"thread": in_a_thread(folder / "thread", made)}
    tensors = {key: split(key, *made["rows"]) for key in SHAPES}
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    errors["full"] = outcome(lambda: write_tensors(folder / "full", tensors, world))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    damage = {"byte": "rank-00003.tensors", "missing": "rank-00002.tensors", "index": "tensors.json"}
    for name, file in damage.items():
        if rank == 0:
            shutil.copytree(folder / "rows", folder / name)
            spoil(folder / name / file, name)
        dist.barrier(group=world)
        errors[name] = outcome(lambda name=name: read_tensors(folder / name, tensors, world))
    if rank == 1:
        tensors["more"] = split("short", *made["all"])
    errors["unfit"] = outcome(lambda: read_tensors(folder / "rows", tensors, world))
    return {"wrong": wrong, "errors": errors}


def spoil(path: Path, how: str) -> None:
    """Flip a bit in a file's middle, or delete it, or cut it."""
    if how == "missing":
        path.unlink()
    elif how == "index":
        os.truncate(path, 100)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)


def in_a_thread(folder: Path, made: dict[str, Any]) -> str:
    """Write while the main thread uses the world's group."""
    import torch
    import torch.distributed as dist

    from tptrain.checkpoint.sharded import write_tensors

    group = dist.new_group(backend="gloo")
    errors = []
    tensors = {key: split(key, *made["both"]) for key in SHAPES}
    thread = threading.Thread(target=lambda: errors.append(outcome(lambda: write_tensors(folder, tensors, group))))
    thread.start()
    for _ in range(20):
        dist.all_reduce(torch.ones(1), group=dist.group.WORLD)
    thread.join(60)
    return errors[0] if errors else "did not end"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folders that four ranks wrote, and what each rank met."""
    folder = tmp_path_factory.mktemp("written")
    return folder, run_ranks(4, write_and_read, folder)


def test_any_layout_reads_what_any_other_wrote(written: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [rank["wrong"] for rank in written[1]] == [[]] * 4


def test_what_one_rank_meets_all_ranks_raise(written: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = written
    errors = ranks[0]["errors"]
    assert all(rank["errors"] == errors for rank in ranks)
    assert errors["thread"] == ""
    assert errors["full"] == f"OSError: [Errno 27] File too large: '{folder}/full/rank-00002.tensors'"
    flipped = (
        rf"DamagedCheckpoint: {folder}/byte/rank-00003\.tensors is not what was written: bytes [\d,]+ to [\d,]+, of \w+, have another "
    )
    assert re.fullmatch(flipped + "checksum", errors["byte"])
    assert errors["missing"] == f"DamagedCheckpoint: {folder}/missing/rank-00002.tensors is missing"
    assert errors["index"] == f"DamagedCheckpoint: {folder}/index/tensors.json is no JSON"
    assert errors["unfit"] == f"UnfitCheckpoint: {folder}/rows has no more"


def test_replicas_are_written_once_and_by_turns(written: tuple[Path, list[dict[str, Any]]]) -> None:
    total = sum(values_of(name).nbytes // (2 if name in HALVES else 1) for name in SHAPES)
    for name in ("rows", "columns", "both", "half", "all", "thread"):
        sizes = [path.stat().st_size for path in (written[0] / name).glob("*.tensors")]
        assert sum(sizes) == total, name
        assert len(sizes) == 4, name
        assert sorted(path.name for path in (written[0] / name).iterdir())[-1] == "tensors.json"


def test_one_process_reads_it_alone_in_another_dtype(written: tuple[Path, list[dict[str, Any]]]) -> None:
    import torch

    from tptrain.checkpoint.sharded import load_whole, read_tensors

    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    read_tensors(written[0] / "both", tensors, None)
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.numpy(), values_of(name)), name
    (folder := written[0] / "complete").mkdir()
    for path in (written[0] / "both").iterdir():
        shutil.copy(path, folder)
    with pytest.raises(ConfigError, match=r"^checkpoint=complete cannot be used: .*/complete/manifest.json is missing: use another$"):
        load_whole(folder, {"matrix": tensors["matrix"]})
    write_manifest(folder)
    with pytest.raises(ConfigError, match=r"^checkpoint=complete cannot be used: .*/complete has no model.matrix: use another$"):
        load_whole(folder, {"matrix": tensors["matrix"]})


def test_the_documented_reader_reads_it(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """The lines of docs/checkpoints.md, as they stand there."""
    text = (ROOT / "docs/checkpoints.md").read_text()
    (code,) = re.findall(r"((?:    .*\n|\n)*    def read\(.*\n(?:    .*\n|\n)*)", text)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code), names)
    for layout in ("rows", "columns", "both", "all"):
        index = json.loads((written[0] / layout / "tensors.json").read_text())["tensors"]
        assert any(len(chunk["xxh3_64"]) > 16 * 4 for chunk in index["matrix"]["chunks"]), "there are tiles"
        for name in SHAPES:
            if name not in HALVES:  # numpy has no bfloat16
                assert np.array_equal(names["read"](written[0] / layout, name), values_of(name)), (layout, name)
