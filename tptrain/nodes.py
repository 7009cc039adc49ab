"""Several nodes prepare one training, whoever starts their ranks: one config, one run folder, the same tokens.

    node 0              finds the checkpoint to go on from, tokenises, writes the run folder: `prepare`, as on a single machine
    each other node     compares its config with node 0's, sees the run folder that node 0 wrote, finds the token store or makes its own

The run folder has to be one for all, since each rank writes its part of a checkpoint into it. The token stores need not: where
data.store_dir is a disk of the node's own, the node tokenises for itself, once, and the tokens must be the same.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tptrain import __version__
from tptrain.checkpoint.folder import complete_checkpoints, home_of
from tptrain.checkpoint.hugging_face.folder import check_folder
from tptrain.config import Config, ConfigError, refuse
from tptrain.council import Council
from tptrain.data import StoreError, prepare
from tptrain.data.digest import digest
from tptrain.job import Job

_OWN_AFFAIRS = ("wandb.", "data.store_dir", "launch.node_rank", "launch.master", "launch.threads_per_rank")
"""Keys that may differ between nodes: node 0's W&B settings are the job's."""
_SHARED_SECONDS = 5.0
"""How long a file may take to be seen on another node."""


def prepare_together(council: Council, config: Config, prepare_first: Callable[[], Job]) -> tuple[Path, Path]:
    """The run folder and this node's token store, once every node is ready. All speakers and listeners of the council call this.

    config: resolved. prepare_first: makes the job; node 0 calls it. Raises ConfigError, on every node, where one of them refuses.
    """
    agree_on(council, config)
    signs: dict[str, str] = {}

    def offer() -> dict[str, Any] | None:
        if council.node > 0:
            return None
        job = prepare_first()
        signs["hydra.run.dir"] = _leave_sign(job.run_dir)
        if job.config.checkpoint.dir is not None:
            signs["checkpoint.dir"] = _leave_sign(Path(job.config.checkpoint.dir))
        tokens = digest(job.store_dir, config.data.source)
        return {"run_dir": str(job.run_dir), "store_dir": str(job.store_dir), "signs": signs, "tokens": tokens}

    offered = council.together("prepared", offer)
    run_dir = Path(offered["run_dir"])
    if config.checkpoint.dir is not None:
        config.checkpoint.dir = str(Path(offered["signs"]["checkpoint.dir"]).parent)

    def accept() -> None:
        store_dir = Path(offered["store_dir"])
        if council.node > 0:
            for key, sign in offered["signs"].items():
                _check_shared(key, Path(sign))
            store_dir = _prepare_here(config, run_dir, store_dir, offered["tokens"])
        council.say("store", str(store_dir))

    try:
        council.together("ready", accept)
    finally:
        for sign in signs.values():
            Path(sign).unlink(missing_ok=True)
    return run_dir, Path(council.hear(council.node, "store"))


def agree_on(council: Council, config: Config) -> None:
    """Return where every node was started with what node 0 was. All speakers and listeners call this. Raises ConfigError, on every node."""
    facts = _facts(config)
    agreed = council.together("config", lambda: facts)
    council.together("the same config", lambda: _check_same(facts, agreed))


def is_seen(path: Path) -> bool:
    """Whether a file that another node wrote is seen on this one, or will be in a moment."""
    end = time.monotonic() + _SHARED_SECONDS
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    return seen


def _facts(config: Config) -> dict[str, Any]:
    """What must be the same on every node, by dotted keys."""
    return {"torch": version("torch"), "tptrain": __version__, **dict(_flat(asdict(config)))}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        elif not key.startswith(_OWN_AFFAIRS):
            yield key, value


def _check_same(own: dict[str, Any], agreed: dict[str, Any]) -> None:
    """Whether this node was started with what node 0 was. Raises ConfigError."""
    for key in sorted(own.keys() | agreed.keys(), key=lambda key: "." in key):
        mine, theirs = own.get(key), agreed.get(key)
        if mine != theirs:
            if key in ("torch", "tptrain"):
                raise ConfigError(f"{key} is {mine} here and {theirs} on node 0: install the same on every node")
            raise refuse(key, mine, f"differs from node 0's {theirs}", "start every node with the same")


def _leave_sign(folder: Path) -> str:
    """A new file in a folder, for the other nodes to find there; its path."""
    sign = folder / f".nodes-{uuid.uuid4().hex}"
    with sign.open("w") as file:
        file.flush()
        os.fsync(file.fileno())
    return str(sign)


def _check_shared(key: str, sign: Path) -> None:
    """Whether the folder of a config key is the one in which node 0 left a sign. Raises ConfigError."""
    if not is_seen(sign):
        rule = "is another folder here than on node 0, but every rank writes its part of a checkpoint there"
        raise refuse(key, sign.parent, rule, "use one on a file system that all nodes share")


def _prepare_here(config: Config, run_dir: Path, store_dir: Path, tokens: str) -> Path:
    """This node's token store: node 0's, where it is seen here, or its own. Raises ConfigError where its text is another."""
    if config.train.init_from is not None and not complete_checkpoints(home_of(config.checkpoint, run_dir)):
        check_folder(config.train.init_from, config.model)
    try:
        found = digest(store_dir, config.data.source)
    except StoreError:
        store_dir = prepare(config, print)
        found = digest(store_dir, config.data.source)
    if found != tokens:
        rule = "has other text here than on node 0"
        raise refuse("data.source", config.data.source, rule, "use the same text on every node, or a data.store_dir that all share")
    return store_dir
