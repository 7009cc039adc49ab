"""Blocks are summed however they are written, and compared only where they are touched."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from tptrain.data.checksums import BLOCK_BYTES, Damage, SummedFile, SummedMap, check_file, sums_path, unchanged, write_summed


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES, 7 * BLOCK_BYTES + 12345])
def test_sums_are_the_crc32_of_each_block_whatever_the_pieces(tmp_path: Path, size: int) -> None:
    generator = np.random.default_rng(size)
    data = generator.bytes(size)
    with SummedFile(tmp_path / "file") as file:
        place = 0
        while place < size:
            piece = int(generator.choice([1, 100, BLOCK_BYTES, 3 * BLOCK_BYTES + 7]))
            file.write(data[place : place + piece])
            place += piece
        note = file.finish()
    assert (tmp_path / "file").read_bytes() == data
    expected = [zlib.crc32(data[start : start + BLOCK_BYTES]) for start in range(0, size, BLOCK_BYTES)]
    assert np.fromfile(sums_path(tmp_path / "file"), dtype="<u4").tolist() == expected
    assert (note.name, note.bytes, note.mtime_ns) == ("file", size, (tmp_path / "file").stat().st_mtime_ns)
    assert note.sums_crc32 == zlib.crc32(np.array(expected, dtype="<u4").tobytes())
    check_file(tmp_path, note)
    SummedMap(tmp_path, note).check(0, size)
    assert unchanged(tmp_path, note)


@pytest.mark.parametrize("place", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 99])
@pytest.mark.parametrize("bit", [0, 7])
def test_any_changed_bit_is_found_and_its_block_named(tmp_path: Path, place: int, bit: int) -> None:
    size = 2 * BLOCK_BYTES + 100
    note = write_summed(tmp_path / "file", np.random.default_rng(1).bytes(size))
    with open(tmp_path / "file", "r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ 1 << bit]))
    block = place // BLOCK_BYTES
    first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, size) - 1
    message = f"{tmp_path}/file, bytes {first} to {last}: the checksum is another"
    with pytest.raises(Damage) as caught:
        check_file(tmp_path, note)
    assert str(caught.value) == message
    found = SummedMap(tmp_path, note)
    for other in {0, 1, 2} - {block}:
        found.check(other * BLOCK_BYTES, other * BLOCK_BYTES + 1)  # which is not what was changed
    with pytest.raises(Damage) as caught:
        found.check(place, place + 1)
    assert str(caught.value) == message


@pytest.mark.parametrize("read", [check_file, SummedMap])
def test_another_size_missing_files_and_changed_sums(tmp_path: Path, read: type) -> None:
    note = write_summed(tmp_path / "file", bytes(1000))
    for size in (999, 1001, 0):
        (tmp_path / "file").write_bytes(bytes(size))
        with pytest.raises(Damage, match=f"file has {size} bytes, not 1000"):
            read(tmp_path, note)
        assert not unchanged(tmp_path, note)
    (tmp_path / "file").unlink()
    with pytest.raises(Damage, match="file cannot be read \\(No such file"):
        read(tmp_path, note)
    write_summed(tmp_path / "file", bytes(1000))
    for damage in (b"abcd", b""):
        (tmp_path / "file.sums").write_bytes(damage)
        with pytest.raises(Damage, match=r"file\.sums is not what was written"):
            read(tmp_path, note)
    (tmp_path / "file.sums").unlink()
    assert not unchanged(tmp_path, note)
    with pytest.raises(Damage, match=r"file\.sums cannot be read"):
        read(tmp_path, note)
