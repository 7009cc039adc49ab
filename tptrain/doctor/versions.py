"""Whether all ranks run the same packages and the same code. Asked before there is a process group: other versions may not even form one.

Each rank leaves what it has in the store in which the ranks find each other; rank 0 compares, and all read what came of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import tptrain
from tptrain.config import ConfigError
from tptrain.doctor.record import ranks_text

PACKAGES = ("torch", "numpy", "datasets", "tokenizers", "huggingface-hub", "safetensors", "xxhash", "hydra-core", "omegaconf")
"""Packages that weights, samples and messages between ranks pass through."""
CODE = "tptrain's code"
"""The name under which the hash of the source stands among the versions."""
_PACKAGE = Path(tptrain.__file__).parent
_MOST_HOSTS = 3
_FAREWELL = timedelta(seconds=5)
"""How long rank 0, which may hold the store, waits until the others have read the outcome."""


@dataclass(frozen=True)
class Told:
    """What one rank has."""

    rank: int
    host: str
    versions: dict[str, str | None]


def own_versions() -> dict[str, str | None]:
    """By name, those of this process; None for what is not there."""
    return {
        "python": platform.python_version(),
        "tptrain": tptrain.__version__,
        CODE: code_hash(_PACKAGE),
        **{name: _installed(name) for name in PACKAGES},
        "CUDA": _cuda(),
        "NCCL": _nccl(),
    }


def code_hash(folder: Path) -> str:
    """12 hexadecimal digits of the SHA-256 of every Python file below `folder`, names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def agree(store: Any, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Return where all ranks have the same versions; every rank calls this. store: of torch.distributed.

    Raises ConfigError, the same on every rank, where they have not; RuntimeError for ranks that do not come in time.
    """
    limit = timedelta(seconds=timeout_seconds)
    store.set(f"has/{rank}", json.dumps([socket.gethostname(), own_versions()]))
    if rank == 0:
        others = [f"has/{other}" for other in range(world_size)]
        try:
            store.wait(others, limit)
        except RuntimeError as error:
            late = [other for other, key in enumerate(others) if not store.check([key])]
            raise RuntimeError(f"timed out: {ranks_text(late)} did not come within launch.timeout_seconds={timeout_seconds:g}") from error
        store.set("refusal", mismatch([Told(other, *json.loads(store.get(key))) for other, key in enumerate(others)]))
    store.wait(["refusal"], 2 * limit)  # rank 0 may have come after the others
    refusal = store.get("refusal").decode()
    store.set(f"read/{rank}", "")
    if rank == 0:
        with contextlib.suppress(RuntimeError):
            store.wait([f"read/{other}" for other in range(world_size)], _FAREWELL)
    if refusal:
        raise ConfigError(refusal)


def mismatch(told: Sequence[Told]) -> str:
    """One line that names the first package whose version is not the same on all ranks, who has which, and the others; empty if none is."""
    differing = [name for name in told[0].versions if len({one.versions.get(name) for one in told}) > 1]
    if not differing:
        return ""
    name, *more = differing
    versions = list(dict.fromkeys(one.versions.get(name) for one in told))
    who = [f"{version or 'missing'} on {_where([one for one in told if one.versions.get(name) == version])}" for version in versions]
    also = f"; {' and '.join([', '.join(more[:-1]), more[-1]] if more[1:] else more)} differ{'s' * (len(more) == 1)} too" if more else ""
    remedy = "run the same code" if name == CODE else "install the same version"
    return f"{name} is {' and '.join(who)}{also}: {remedy} on every rank"


def _where(told: Sequence[Told]) -> str:
    """`ranks 0-3 (host-a)`."""
    hosts = list(dict.fromkeys(one.host for one in told))
    shown = ", ".join(hosts[:_MOST_HOSTS]) + f" and {len(hosts) - _MOST_HOSTS} more" * (len(hosts) > _MOST_HOSTS)
    return f"{ranks_text(one.rank for one in told)} ({shown})"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str | None:
    from torch.version import cuda

    return cuda


def _nccl() -> str | None:
    import torch

    if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))
