"""From what Hydra has composed to an object of a verb's schema, and what Hydra knows of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tptrain.config import Config
from tptrain.eval_config import EvalConfig
from tptrain.export_config import ExportConfig
from tptrain.generate_config import GenerateConfig
from tptrain.plot_config import PlotConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

C = TypeVar("C")


def typed(cfg: DictConfig) -> Config:
    """The composed config of a training as an object; see `typed_as`."""
    return typed_as(Config, cfg)


def typed_as(schema: type[C], cfg: DictConfig) -> C:
    """The composed config as an object of the schema. Raises ConfigError for a key or a value that the schema has not."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from tptrain.refusal import explain

    _check_keys(OmegaConf.to_container(cfg), schema)
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise explain(error, hydra_overrides(), schema) from error
    assert isinstance(config, schema)
    return config


def store_schemas(of_verb: type) -> None:
    """Make the verbs' config classes the types of everything that Hydra composes. of_verb: which of a training's may be an extension."""
    from hydra.core.config_store import ConfigStore

    from tptrain.job import schema

    ConfigStore.instance().store(name="schema", node=schema(of_verb if issubclass(of_verb, Config) else Config))
    ConfigStore.instance().store(name="generate_schema", node=schema(GenerateConfig))
    ConfigStore.instance().store(name="eval_schema", node=schema(EvalConfig))
    ConfigStore.instance().store(name="export_schema", node=schema(ExportConfig))
    ConfigStore.instance().store(name="plot_schema", node=schema(PlotConfig))


def hydra_overrides() -> list[str]:
    """The overrides of the config, as they stand on the command line."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    # Unresolved: an override may be the text "data.path=${model.name}".
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(overrides)


def all_overrides() -> list[str]:
    """Those of the config, and Hydra's own that a job of its own can have."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    given: Any = OmegaConf.to_container(HydraConfig.get().overrides.hydra, resolve=False)
    of_the_sweep = ("hydra.mode=", "hydra.sweep.", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper")
    return [*hydra_overrides(), *(override for override in given if not override.lstrip("+~").startswith(of_the_sweep))]


def config_flags() -> list[str]:
    """`--config-dir FOLDER`, where that was given, with the folder's whole path."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    return [word for source in sources if source.provider == "command-line" for word in ("--config-dir", source.path)]


def _check_keys(values: Any, kind: Any, prefix: str = "", schema: Any = None) -> None:
    """Refuse keys that the schema has not: `+key=value` adds one, and OmegaConf would drop it in silence."""
    from typing import get_type_hints

    from tptrain.job import group_of
    from tptrain.refusal import unknown_key

    hints = {key: group_of(hint) for key, hint in get_type_hints(kind).items()}
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(prefix + key, value, schema or kind)
        if is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check_keys(value, hints[key], f"{prefix}{key}.", schema or kind)


def is_job() -> bool:
    """Whether this run is a job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def sweep_dir() -> Path:
    """The folder of the sweep of which this run is a job."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().sweep.dir)
