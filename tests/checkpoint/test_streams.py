"""Any tensors come back as they were, whatever the sizes of tiles, batches and blocks; also where a file system knows no O_DIRECT."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tptrain.checkpoint import reader, tiles, writer
from tptrain.checkpoint.direct import BLOCK, Buffer, DirectFile
from tptrain.checkpoint.sharded import read_tensors, write_tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]
CREATE = os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def random_of(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """A tensor of random bits that are no NaN."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2 if dtype == torch.bool else 120, shape, generator=generator)
    return numbers.to(dtype)


SETS = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 40), max_size=3)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(SETS, st.sampled_from([64, 1000, 1 << 20]), st.sampled_from([1, BLOCK, 3 * BLOCK]))
def test_any_tensors_come_back(group: dist.ProcessGroup, chosen: list[Any], tile_bytes: int, batch_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(tiles, "TILE_BYTES", tile_bytes)
        patch.setattr(tiles, "ROW_NUMBERS", 3)
        for module in (reader, writer):
            patch.setattr(module, "BATCH_BYTES", batch_bytes)
        tensors = {f"t{number}": random_of(dtype, shape, number) for number, (dtype, shape) in enumerate(chosen)}
        write_tensors(Path(name), tensors, group)
        assert Path(name, "rank-00000.tensors").stat().st_size == sum(tensor.nbytes for tensor in tensors.values())
        found = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
        read_tensors(Path(name), found, group)
        for key, tensor in tensors.items():
            assert found[key].equal(tensor), (key, tensor.dtype, tensor.shape)


def test_a_file_of_blocks_is_cut_to_its_length(tmp_path: Path) -> None:
    buffer = Buffer(BLOCK + 1)
    assert buffer.length == 2 * BLOCK
    buffer.view(0, torch.int64, (BLOCK // 4,)).copy_(torch.arange(BLOCK // 4))
    with DirectFile(tmp_path / "file", CREATE) as file:
        file.write(buffer.bytes, 0)
        file.write(buffer.bytes[:BLOCK], 2 * BLOCK)
        file.finish(2 * BLOCK + 24)
    data = (tmp_path / "file").read_bytes()
    assert data == bytes(buffer.bytes) + bytes(buffer.bytes[:24])
    again = Buffer(4 * BLOCK)
    with DirectFile(tmp_path / "file", os.O_RDONLY) as file:
        assert file.read(again.bytes, 0) == len(data), "all that there is"
        assert bytes(again.bytes[: len(data)]) == data
        assert file.read(again.bytes[:BLOCK], BLOCK) == BLOCK
        assert bytes(again.bytes[:BLOCK]) == data[BLOCK : 2 * BLOCK]
        assert file.read(again.bytes[:BLOCK], 4 * BLOCK) == 0


@pytest.mark.parametrize("when", ["opened", "used"])
def test_a_file_system_without_direct_io(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as refuses the flag, and such as takes it and refuses the calls, as every one does with half a block."""
    direct, opened = getattr(os, "O_DIRECT", 0), os.open

    def refusing(path: Any, flags: int, *more: Any) -> int:
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return opened(path, flags, *more)

    if when == "opened":
        monkeypatch.setattr(os, "open", refusing)
    half = memoryview(bytearray(b"x" * (BLOCK // 2)))
    with DirectFile(tmp_path / "file", CREATE) as file:
        file.write(half, 0)
        file.write(half, BLOCK // 2 + 1)
        file.finish(BLOCK)
        found = memoryview(bytearray(10))
        assert file.read(found, BLOCK // 2 - 5) == 10
    assert bytes(found) == b"xxxxx\0xxxx"
    assert (tmp_path / "file").read_bytes() == b"x" * (BLOCK // 2) + b"\0" + b"x" * (BLOCK // 2 - 1)


def test_other_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "none", os.O_RDONLY)
    (tmp_path / "file").touch()
    with DirectFile(tmp_path / "file", os.O_RDONLY) as file, pytest.raises(OSError, match="Bad file descriptor"):
        file.write(Buffer(BLOCK).bytes, 0)
