"""A `Job`: one resolved config and its folders, and its way through `config.yaml` from the launcher to the ranks."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config import Config


@dataclass(frozen=True)
class Job:
    """One training job: all that a rank needs."""

    config: Config
    """Resolved."""
    run_dir: Path
    """The run folder, absolute."""
    store_dir: Path
    """The folder of the tokenised data, absolute."""

    def save(self) -> None:
        """Write `config.yaml`: what was asked, resolved. Ranks read it back by `load`."""
        from omegaconf import OmegaConf

        OmegaConf.save(OmegaConf.create(dataclasses.asdict(self.config)), self.run_dir / "config.yaml")

    @staticmethod
    def load(run_dir: Path, store_dir: Path) -> Job:
        """The job whose `config.yaml` is in `run_dir`."""
        from omegaconf import OmegaConf

        config = OmegaConf.to_object(OmegaConf.merge(schema(), OmegaConf.load(run_dir / "config.yaml")))
        assert isinstance(config, Config)
        return Job(config, run_dir, store_dir)


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this machine."""


ALONE = Place(rank=0, world_size=1, local_rank=0, local_world_size=1)


def schema() -> Any:
    """OmegaConf's node of `Config`, with every group present and every value missing.

    OmegaConf 2.3 cannot merge into a missing group that has an `int | str` field, so no group may be missing.
    """
    from omegaconf import OmegaConf

    node = OmegaConf.structured(Config)
    for key, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            node[key] = OmegaConf.structured(kind)
    return node


def keys(kind: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every key of the schema, dotted, with its type: groups and values."""
    found: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(kind).items():
        found[prefix + key] = hint
        if dataclasses.is_dataclass(hint):
            found |= keys(hint, f"{prefix}{key}.")
    return found
