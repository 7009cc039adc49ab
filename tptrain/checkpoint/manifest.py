"""`manifest.json`: which files a checkpoint has, how long they are, and checksums of the JSON ones. Knows no torch.

    {"format": 1, "files": {"rank-00000.tensors": {"bytes": 1493205}, "state.json": {"bytes": 2143, "xxh3_64": "0c1f6a2b9d3e4f50"}, ...}}

Checksums are XXH3 of 64 bits, as 16 hex digits. They find what a disk or a copy has spoilt; they are no signature. Those of the tensors'
bytes stand in `tensors.json`, for the reader compares them while it reads.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import xxhash

from tptrain.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


class DamagedCheckpoint(Exception):
    """A file of a checkpoint is missing, or is not what was written. One line that begins with the file."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it can travel to other ranks
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


def write_manifest(folder: Path) -> None:
    """Note all files of a folder, which are on disk already. One process does it, as the last thing that is written."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            files[path.name] = {"bytes": path.stat().st_size}
            if path.suffix == ".json":
                files[path.name]["xxh3_64"] = xxhash.xxh3_64_hexdigest(path.read_bytes())
    write_atomically(folder / MANIFEST, (json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n").encode())


def check_manifest(folder: Path) -> None:
    """Compare a folder with its manifest: every file's length, and the content of the JSON ones. Quick at any size.

    What tensors' files hold is compared while it is read. Raises DamagedCheckpoint.
    """
    path = folder / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        raise DamagedCheckpoint(path, f"is no manifest of format {FORMAT}")
    for name, note in content["files"].items():
        if name != os.path.basename(name) or name in ("", ".", "..", MANIFEST) or "\0" in name:
            raise DamagedCheckpoint(path, f"names {name!r}, which is no file of this folder")
        checksum = note.get("xxh3_64") if isinstance(note, dict) else None
        has_checksum = isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum)
        if not isinstance(note, dict) or type(note.get("bytes")) is not int or (name.endswith(".json") and not has_checksum):
            raise DamagedCheckpoint(path, f"does not say how long {name} is, or its checksum")
        _check_file(folder / name, note["bytes"], checksum)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DamagedCheckpoint where there is none."""
    data = _read(path)
    if not data:
        raise DamagedCheckpoint(path, "is empty")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedCheckpoint(path, "is no JSON") from None


def file_size(path: Path) -> int:
    """The bytes of a file. Raises DamagedCheckpoint where it is none: a link may lead anywhere, and a pipe never ends."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(path, "is no regular file")
    return found.st_size


def unreadable(path: Path, error: OSError) -> DamagedCheckpoint:
    """What to raise for a file that cannot be read."""
    return DamagedCheckpoint(path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})")


def _check_file(path: Path, size: int, checksum: str | None) -> None:
    found = file_size(path)
    if found != size:
        raise DamagedCheckpoint(path, f"has {found:,} bytes, and {MANIFEST} says {size:,}")
    if checksum is not None and xxhash.xxh3_64_hexdigest(_read(path)) != checksum:
        raise DamagedCheckpoint(path, f"is not what was written: its checksum differs from that in {MANIFEST}")


def _read(path: Path) -> bytes:
    file_size(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
