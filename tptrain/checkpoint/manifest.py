"""`manifest.json`: the size and the checksum of every other file of a checkpoint. Knows no torch.

    {"format": 1, "files": {"state.json": {"bytes": 2143, "xxh3_64": "0c1f6a2b9d3e4f50"}, ...}}

The checksum is XXH3 (64 bits, as 16 hex digits) of the whole file. It finds what a disk or a copy has spoilt; it is no signature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from tptrain.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1
PIECE_BYTES = 8 << 20
"""Files are read, written and summed by so much at a time."""


class DamageError(Exception):
    """A checkpoint cannot be used. One line that names the file."""


@dataclass(frozen=True)
class FileNote:
    """What the manifest says of a file."""

    bytes: int
    xxh3_64: str


def write_manifest(folder: Path, files: Mapping[str, FileNote]) -> None:
    """Note all files of a folder. They are on disk already."""
    content = {"format": FORMAT, "files": {name: asdict(note) for name, note in sorted(files.items())}}
    write_atomically(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, FileNote]:
    """The files of a checkpoint, by name. Raises DamageError."""
    path = folder / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        raise DamageError(f"{path} is no manifest of format {FORMAT}")
    files: dict[str, FileNote] = {}
    for name, note in content["files"].items():
        if "/" in name or name in (".", "..", MANIFEST):
            raise DamageError(f"{path} names {name!r}, which is no file of this folder")
        if not (isinstance(note, dict) and isinstance(note.get("bytes"), int) and isinstance(note.get("xxh3_64"), str)):
            raise DamageError(f"{path} does not say bytes and xxh3_64 of {name}")
        files[name] = FileNote(note["bytes"], note["xxh3_64"])
    return files


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DamageError where there is none."""
    data = _read(path)
    if not data:
        raise DamageError(f"{path} is empty")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise DamageError(f"{path} is no JSON") from None


def check_sizes(folder: Path) -> dict[str, FileNote]:
    """Check that every file is there and as long as it was, and that the JSON files are what was written: quick at any size.

    Returns the manifest. Raises DamageError.
    """
    files = read_manifest(folder)
    for name, note in files.items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            raise _unreadable(folder / name, error) from None
        if size != note.bytes:
            raise DamageError(f"{folder / name} has {size:,} bytes, and the manifest says {note.bytes:,}")
    check_content(folder, files, [name for name in files if name.endswith(".json")])
    return files


def check_content(folder: Path, files: Mapping[str, FileNote], names: Iterable[str]) -> None:
    """Check these files byte by byte against the manifest. Raises DamageError."""
    for name in names:
        if note_of(folder / name) != files[name]:
            raise DamageError(f"{folder / name} is not what was written: its checksum differs from the manifest's")


def note_of(path: Path) -> FileNote:
    """Size and checksum of a file as it stands. Raises DamageError where it cannot be read."""
    checksum, size = xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                checksum.update(buffer[:count])
                size += count
    except OSError as error:
        raise _unreadable(path, error) from None
    return FileNote(size, checksum.hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DamageError:
    if isinstance(error, FileNotFoundError):
        return DamageError(f"{path} is missing")
    return DamageError(f"{path} cannot be read ({error.strerror})")
