"""Files with the crc32 of each block of 64 KiB beside them, so that a read can check what it touches and no more.

    train-00000.tokens          the data
    train-00000.tokens.sums     uint32 [blocks], the last block being shorter

What a whole folder notes of such a file (`FileNote`) holds the sums' own crc32: a changed sum is told from a changed block,
and two files are the same if their notes are.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK_BYTES = 1 << 16


class Damage(ValueError):
    """A file is not what was written. The message names the file, and the bytes where they are known."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}{what}")
        self.path = path
        self.what = what


@dataclass(frozen=True)
class FileNote:
    """What a store notes of a file."""

    name: str
    bytes: int
    mtime_ns: int
    """Modification time: while it is the same, nobody has written to the file."""
    sums_crc32: int
    """crc32 of the file's sums, and with them of all of the file."""

    def same_content(self, other: FileNote) -> bool:
        """Whether both stand for the same bytes (to within crc32)."""
        return (self.bytes, self.sums_crc32) == (other.bytes, other.sums_crc32)


class SummedFile:
    """Writes a file and its sums. As a context manager, closes it. OSErrors name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._sums: list[int] = []
        self._held = bytearray()
        """The beginning of a block that is not full yet."""
        with naming(path):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Append."""
        self.bytes += len(data)
        self._held += data
        whole = len(self._held) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            self._put(bytes(memoryview(self._held)[:whole]))
            del self._held[:whole]

    def finish(self) -> FileNote:
        """Put the file and its sums on disk and close it."""
        if self._held:
            self._put(bytes(self._held))
        with naming(self.path):
            os.fsync(self._file.fileno())
            mtime_ns = os.fstat(self._file.fileno()).st_mtime_ns
            self._file.close()
        sums = np.array(self._sums, dtype="<u4").tobytes()
        path = sums_path(self.path)
        with naming(path), open(path, "wb", buffering=0) as file:
            _write_all(file.fileno(), sums)
            os.fsync(file.fileno())
        return FileNote(self.path.name, self.bytes, mtime_ns, zlib.crc32(sums))

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        self._sums += [zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]
        with naming(self.path):
            _write_all(self._file.fileno(), data)


def write_summed(path: Path, data: bytes) -> FileNote:
    """Write a small file and its sums, and put them on disk."""
    with SummedFile(path) as file:
        file.write(data)
        return file.finish()


class SummedMap:
    """A file mapped for reading, whose blocks are checked when a read first touches them.

    Raises Damage where the file is missing, has another size than its note or sums that are not its own.
    """

    def __init__(self, folder: Path, note: FileNote) -> None:
        self.path = folder / note.name
        self.sums = _read_sums(self.path, note)
        self._seen = bytearray(len(self.sums))
        try:
            with open(self.path, "rb") as file:
                _check_size(self.path, os.fstat(file.fileno()).st_size, note)
                self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if note.bytes else b"")
        except OSError as error:
            raise Damage(self.path, f" cannot be read ({error.strerror})") from error

    def check(self, start: int, end: int) -> None:
        """Compare the blocks of bytes start .. end - 1 that were not compared before. Raises Damage."""
        for block in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if not self._seen[block]:
                first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, len(self.data))
                if zlib.crc32(self.data[first:last]) != self.sums[block]:
                    raise Damage(self.path, f", bytes {first} to {last - 1}: the checksum is another")
                self._seen[block] = 1


def check_file(folder: Path, note: FileNote) -> None:
    """Read a whole file and compare. Raises Damage."""
    path = folder / note.name
    sums = _read_sums(path, note)
    try:
        with open(path, "rb") as file:
            _check_size(path, os.fstat(file.fileno()).st_size, note)
            for block, wanted in enumerate(sums):
                if zlib.crc32(file.read(BLOCK_BYTES)) != wanted:
                    last = min((block + 1) * BLOCK_BYTES, note.bytes) - 1
                    raise Damage(path, f", bytes {block * BLOCK_BYTES} to {last}: the checksum is another")
    except OSError as error:
        raise Damage(path, f" cannot be read ({error.strerror})") from error


def unchanged(folder: Path, note: FileNote) -> bool:
    """Whether a file has the size and the time of its note, without reading it."""
    try:
        found = os.stat(folder / note.name)
        sums_bytes = os.stat(sums_path(folder / note.name)).st_size
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns, sums_bytes) == (note.bytes, note.mtime_ns, -(-note.bytes // BLOCK_BYTES) * 4)


def sums_path(path: Path) -> Path:
    """Where a file's sums are."""
    return path.with_name(path.name + ".sums")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the path that it is about, as writing to an open file does not say."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read_sums(path: Path, note: FileNote) -> np.ndarray:
    try:
        data = sums_path(path).read_bytes()
    except OSError as error:
        raise Damage(sums_path(path), f" cannot be read ({error.strerror})") from error
    if zlib.crc32(data) != note.sums_crc32 or len(data) != -(-note.bytes // BLOCK_BYTES) * 4:
        raise Damage(sums_path(path), " is not what was written")
    return np.frombuffer(data, dtype="<u4")


def _check_size(path: Path, found_bytes: int, note: FileNote) -> None:
    if found_bytes != note.bytes:
        raise Damage(path, f" has {found_bytes} bytes, not {note.bytes}")


def _write_all(descriptor: int, data: bytes) -> None:
    """os.write may write less than it is given, as on a disk that is nearly full."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
