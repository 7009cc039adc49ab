"""Ids across shards are the ids that were written, or an error."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tptrain.data.checksums import BLOCK_BYTES, write_summed
from tptrain.data.meta import Shard, StoreError
from tptrain.data.tokens import MARK, Tokens

SIZES = [50_000, 1, 200_000, 33, 70_000]


def written(folder: Path, sizes: list[int], dtype: str = "<u2") -> tuple[Tokens, np.ndarray]:
    ids = np.random.default_rng(len(sizes)).integers(0, 60_000, sum(sizes)).astype(dtype)
    shards = []
    for number, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        note = write_summed(folder / f"train-{number:05d}.tokens", ids[end - size : end].tobytes())
        shards.append(Shard(note, size, 1, number, number + 1))
    return Tokens(folder, shards, np.dtype(dtype)), ids


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_any_slice_is_that_of_one_array(tmp_path: Path, dtype: str) -> None:
    tokens, ids = written(tmp_path, SIZES, dtype)
    assert (len(tokens), tokens.dtype) == (len(ids), ids.dtype)
    generator = np.random.default_rng(0)
    ends = np.cumsum([0, *SIZES])
    places = np.concatenate((generator.integers(-len(ids) - 5, len(ids) + 5, 300), ends, ends - 1, ends + 1))
    for start, end in generator.choice(places, (500, 2)).tolist():
        found = tokens[start:end]
        assert found.dtype == ids.dtype
        assert np.array_equal(found, ids[start:end])
        assert not found.flags.writeable
    assert np.array_equal(tokens[:], ids)
    assert np.array_equal(tokens[-7:], ids[-7:])
    with pytest.raises(ValueError, match="without a step"):
        tokens[::2]


def test_no_shard_at_all(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path, [], np.dtype("<u2"))
    assert len(tokens) == 0
    assert tokens[:].tolist() == tokens[3:9].tolist() == []


def test_a_shard_is_opened_when_it_is_touched(tmp_path: Path) -> None:
    tokens, ids = written(tmp_path, SIZES)
    for number in (1, 3, 4):
        (tmp_path / f"train-{number:05d}.tokens").unlink()
    assert np.array_equal(tokens[:50_000], ids[:50_000])
    with pytest.raises(StoreError) as caught:
        tokens[49_999:50_001]
    assert str(caught.value) == (
        f"{tmp_path}/train-00001.tokens cannot be read (No such file or directory): start the run again, and it is built anew"
    )


def test_more_shards_than_are_mapped_at_a_time(tmp_path: Path) -> None:
    tokens, ids = written(tmp_path, [3] * 700)
    open_before = len(os.listdir("/proc/self/fd"))
    for start in np.random.default_rng(0).permutation(700 * 3 - 4).tolist():
        assert np.array_equal(tokens[start : start + 4], ids[start : start + 4])
    assert len(os.listdir("/proc/self/fd")) - open_before <= 256


def test_only_what_is_read_is_compared(tmp_path: Path) -> None:
    tokens, ids = written(tmp_path, SIZES)
    per_block = BLOCK_BYTES // 2
    with open(tmp_path / "train-00002.tokens", "r+b") as file:
        file.seek(BLOCK_BYTES + 10)
        file.write(b"\xff\xff\xff")
    base = 50_001
    assert np.array_equal(tokens[: base + per_block], ids[: base + per_block])
    assert np.array_equal(tokens[base + 2 * per_block :], ids[base + 2 * per_block :])
    assert not (tmp_path / MARK).exists()
    for start, end in ((base + per_block, base + per_block + 1), (base, base + per_block + 1), (0, len(ids))):
        with pytest.raises(StoreError) as caught:
            tokens[start:end]
        damage = f"{tmp_path}/train-00002.tokens, bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES - 1}: the checksum is another"
        assert str(caught.value) == f"{damage}: start the run again, and it is built anew"
    assert (tmp_path / MARK).read_text() == f"{damage}\n"


def test_truncated_before_it_is_touched(tmp_path: Path) -> None:
    tokens, _ = written(tmp_path, SIZES)
    os.truncate(tmp_path / "train-00004.tokens", 100)
    with pytest.raises(StoreError, match=r"train-00004\.tokens has 100 bytes, not 140000: start the run again"):
        tokens[-1:]


def test_reads_from_several_threads(tmp_path: Path) -> None:
    tokens, ids = written(tmp_path, [500] * 300)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, len(ids) - 999, 400).tolist():
            if not np.array_equal(tokens[start : start + 999], ids[start : start + 999]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
