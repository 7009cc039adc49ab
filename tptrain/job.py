"""A `Job`: what ranks are to do, with one resolved config and its folders, and its way through `config.yaml` to the ranks."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tptrain.config import Config
from tptrain.stop import Wish


@dataclass(frozen=True)
class Job:
    """All that a rank needs."""

    work: str
    """What the ranks do: a name in `ranks.WORKS`."""
    config: Any
    """Resolved; of the schema that the work asks for, in training `Config`."""
    run_dir: Path
    """The run folder, absolute."""
    store_dir: Path
    """The folder of the tokenised data, absolute."""
    wish: Wish = field(default_factory=Wish, compare=False)
    """What tells this process to stop; it does not travel."""

    def save(self) -> None:
        """Write `config.yaml`: what was asked, resolved. Ranks read it back by `load`."""
        from omegaconf import OmegaConf

        OmegaConf.save(OmegaConf.create(literal(dataclasses.asdict(self.config))), self.run_dir / "config.yaml")

    @staticmethod
    def load(work: str, run_dir: Path, store_dir: Path, kind: Any = Config) -> Job:
        """The job whose `config.yaml`, of the schema `kind`, is in `run_dir`."""
        from omegaconf import OmegaConf

        config: Any = OmegaConf.to_object(OmegaConf.merge(schema(kind), OmegaConf.load(run_dir / "config.yaml")))
        assert isinstance(config, kind)
        return Job(work, config, run_dir, store_dir)


def literal(values: Any) -> Any:
    """`values`, nested lists and dicts, in which OmegaConf sees no interpolation: a `${` in a text stands for itself.

    >>> print(literal(["echo ${HOME}", 2])[0])
    echo \\${HOME}
    """
    if isinstance(values, dict):
        return {key: literal(value) for key, value in values.items()}
    if isinstance(values, list):
        return [literal(value) for value in values]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


def as_override(key: str, text: str) -> str:
    """An override by which Hydra sets `key` to that text, whatever is in it.

    >>> print(as_override("prompt", "def f('a'"))
    prompt='def f(\\'a\\''
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    return f"{key}={QuotedString(literal(text), Quote.single).with_quotes()}"


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this machine; on each other as many."""
    own_gpu: bool = False
    """Whether the launcher shows this process one GPU alone, its own, instead of all that the machine has."""

    @property
    def node(self) -> int:
        """Which machine this is."""
        return self.rank // self.local_world_size

    @property
    def neighbours(self) -> range:
        """The ranks on this machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)

    @property
    def nodes(self) -> int:
        """Machines of the job."""
        return self.world_size // self.local_world_size


ALONE = Place(rank=0, world_size=1, local_rank=0, local_world_size=1)


@dataclass(frozen=True)
class Meeting:
    """Where the ranks that the commands of several nodes start find each other."""

    host: str
    port: int
    attempt: int
    """How often the ranks have been started before."""
    first_rank: int
    """The first of this node's ranks."""
    world_size: int
    """Ranks of all nodes."""


def schema(kind: Any = Config) -> Any:
    """OmegaConf's node of a config class, with every group present and every value missing.

    OmegaConf 2.3 cannot merge into a missing group that has an `int | str` field, so no group may be missing.
    """
    from omegaconf import OmegaConf

    node = OmegaConf.structured(kind)
    for key, group in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(group):
            node[key] = OmegaConf.structured(group)
    return node


def keys(kind: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every key of the schema, dotted, with its type: groups and values."""
    found: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(kind).items():
        found[prefix + key] = group = group_of(hint)
        if dataclasses.is_dataclass(group):
            found |= keys(group, f"{prefix}{key}.")
    return found


def group_of(hint: Any) -> Any:
    """A type of the schema; of a group that may be null the group's."""
    kinds = typing.get_args(hint)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), hint) if type(None) in kinds else hint
