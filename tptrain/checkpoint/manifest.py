"""Thin stand-in."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from tptrain.files import write_atomically

MANIFEST = "manifest.json"


class DamagedCheckpoint(Exception):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


def write_manifest(folder: Path) -> None:
    files = {path.name: [path.stat().st_size, zlib.crc32(path.read_bytes())] for path in folder.iterdir()}
    write_atomically(folder / MANIFEST, json.dumps(files).encode())


def check_manifest(folder: Path) -> None:
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except OSError:
        raise DamagedCheckpoint(folder / MANIFEST, "is missing") from None
    except ValueError:
        raise DamagedCheckpoint(folder / MANIFEST, "is no JSON") from None
    for name, (size, crc) in files.items():
        if not (folder / name).is_file():
            raise DamagedCheckpoint(folder / name, "is missing")
        data = (folder / name).read_bytes()
        if len(data) != size or zlib.crc32(data) != crc:
            raise DamagedCheckpoint(folder / name, "is not what was written")
